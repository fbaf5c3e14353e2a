"""Data keys of a configuration: what they become, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from autotune.config import load_config
from autotune.errors import AutotuneError
from autotune.spec.training import DatasetSource, PromptFormat

BASE = "base_model: tiny-qwen3\nlearning_rate: 2e-5\n"


@pytest.fixture
def load(tmp_path: Path):
    def load_text(extra: str):
        path = tmp_path / "config.yml"
        path.write_text(BASE + extra)
        return load_config(path)

    return load_text


def test_every_key_of_a_conversation_arrives(load, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("{{ messages }}")
    (source,) = load("""
datasets:
  - path: owner/name
    name: en
    revision: main
    split: train[:10%]
    data_files: [a/*.json]
    type: chat_template
    chat_template: jinja
    chat_template_jinja: own.jinja
    field_messages: talk
    field_tools: calls
    message_field_role: from
    message_property_mappings: {content: value}
    message_field_training: train
    roles: {assistant: [bot]}
    roles_to_train: [assistant, tool]
    train_on_eos: last
    drop_system_message: true
    shards: 4
    shards_idx: 3
    skip: 10
    preprocess_shards: 2
    trust_remote_code: false
""").datasets
    assert source == DatasetSource(
        path="owner/name",
        name="en",
        revision="main",
        split="train[:10%]",
        data_files=["a/*.json"],
        type="chat_template",
        chat_template="jinja",
        chat_template_jinja="{{ messages }}",
        field_messages="talk",
        field_tools="calls",
        message_property_mappings={"role": "from", "content": "value"},
        message_field_training="train",
        roles={"assistant": ["bot"]},
        roles_to_train=["assistant", "tool"],
        train_on_eos="last",
        drop_system_message=True,
        shards=4,
        shards_idx=3,
        skip=10,
    )


def test_the_template_of_the_file_holds_where_an_entry_states_none(load) -> None:
    config = load(
        "chat_template: llama3\n"
        "datasets: [{path: a, type: chat_template}, "
        "{path: b, type: chat_template, chat_template: chatml}, {path: c}]\n"
        "test_datasets: [{path: d, type: chat_template, chat_template_jinja: '{{ x }}'}]"
    )
    assert [source.chat_template for source in config.datasets] == ["llama3", "chatml", None]
    assert (config.test_datasets[0].chat_template, config.test_datasets[0].chat_template_jinja) == (
        None,
        "{{ x }}",
    )


def test_a_prompt_of_one_s_own(load) -> None:
    (source,) = load(
        "datasets: [{path: a, type: {field_instruction: q, format: '[{instruction}] {input}'}}]"
    ).datasets
    assert source.type == PromptFormat(
        field_instruction="q", format="[{instruction}] {input}", no_input_format="[{instruction}] "
    )


def test_settings_for_all_data(load) -> None:
    plain = load("").data
    assert not (plain.train_on_inputs or plain.exact_deduplication or plain.streaming)
    assert plain.excess_length_strategy == "drop"
    data = load(
        "train_on_inputs: true\nexcess_length_strategy: truncate\n"
        "dataset_exact_deduplication: true\nstreaming: true"
    ).data
    assert data.train_on_inputs and data.exact_deduplication and data.streaming
    assert data.excess_length_strategy == "truncate"


@pytest.mark.parametrize(
    "written",
    [
        "owner/name",
        "{path: owner/name}",
        "[{path: owner/name, type: pretrain, text_column: body, skip: 5, split: train}]",
    ],
)
def test_pretraining_data_is_streamed_text(load, written: str) -> None:
    config = load(f"pretraining_dataset: {written}\nmax_steps: 3")
    (source,) = config.datasets
    assert (source.path, source.type, source.split) == ("owner/name", "completion", "train")
    assert source.field == ("body" if "body" in written else None)
    assert source.skip == (5 if "skip" in written else None)
    assert config.data.streaming
    assert "pretraining_dataset" not in config.passthrough


WRONG = [
    ("datasets: [{path: a, type: alpacca}]", "Nearest: alpaca"),
    ("datasets: [{path: a, type: 3}]", "a mapping with format|Write text"),
    ("datasets: [{path: a, type: {formt: x}}]", "unknown key `formt` Nearest: format"),
    ("datasets: [{path: a, type: {format: 3}}]", "every value is text"),
    ("datasets: [{path: a, field: b, type: alpaca}]", "field is not used here with type alpaca"),
    ("datasets: [{path: a, train_on_eos: turn}]", "train_on_eos is not used .* type completion"),
    ("datasets: [{path: a, shards: 0}]", "shards: 0"),
    ("datasets: [{path: a, shards: 2, shards_idx: 2}]", "less than shards"),
    ("datasets: [{path: a, shards_idx: 0}]", "less than shards"),
    ("datasets: [{path: a, data_files: []}]", "a list of texts"),
    ("datasets: [{path: a, trust_remote_code: true}]", "not run here"),
    ("datasets: [{path: a, type: chat_template, roles: [b]}]", "Write lists of names"),
    ("datasets: [{path: a, type: chat_template, train_on_eos: al}]", "Nearest: all"),
    ("datasets: [{path: a, type: chat_template, message_property_mappings: b}]", "Write names"),
    (
        "datasets: [{path: a, type: chat_template, message_field_role: x, "
        "message_property_mappings: {role: y}}]",
        "contradicts",
    ),
    (
        "datasets: [{path: a, type: chat_template, chat_template_jinja: none.jinja}]",
        "neither a template nor a file",
    ),
    ("datasets: [{path: a}]\npretraining_dataset: b", "exclude each other"),
    ("pretraining_dataset: [{path: a, shards: 2}]", "unknown key `shards`"),
    ("pretraining_dataset: [{split: train}]", "has no path"),
]


@pytest.mark.parametrize(("extra", "said"), WRONG)
def test_wrong_keys_are_refused(load, extra: str, said: str) -> None:
    with pytest.raises(AutotuneError, match=said) as caught:
        load(extra)
    assert caught.value.exit_code == 2
