"""Reading configurations: what comes out, and what a person is told about a mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from autotune.config import load_config, preset_names
from autotune.errors import AutotuneError
from autotune.plan import Engine, Plan
from autotune.spec.workload import Precision
from tests.unit.config_files import BASE, loader, refusal


@pytest.fixture
def load(tmp_path):
    return loader(tmp_path)


def test_defaults_are_axolotls(load):
    config = load()
    assert config.workload.seq_len == 512
    assert not config.workload.packing
    assert config.workload.precision is Precision.BF16
    assert config.workload.optimizer == "adamw"
    assert config.train.lr_scheduler == "cosine"
    assert config.seed == 42
    assert config.output_dir == "./model-out"
    assert config.model.hidden_size == 256


def test_number_that_yaml_reads_as_text(load):
    """PyYAML reads 2e-5, which has no dot, as a string."""
    assert load().train.learning_rate == 2e-5


def test_ddp_without_an_engine(load):
    plan = load().plan(4)
    assert plan == Plan(
        strategy="ddp", engine=Engine.DDP, dp_replicate=4, micro_batch_size=2, grad_accum_steps=4
    )


def test_global_batch_follows_the_gpus(load):
    config = load("context_parallel_size: 2")
    assert config.workload_on(8).global_batch_size == 2 * 4 * 4
    assert config.workload.global_batch_size == 2 * 4


def test_block_names_the_gpus(load):
    assert load("autotune: {num_gpus: 8}").workload.global_batch_size == 64


def test_batch_size_gives_the_accumulation(load):
    base = "base_model: tiny-qwen3\nlearning_rate: 1e-4\nmicro_batch_size: 3\n"
    assert load("batch_size: 12", base).plan(1).grad_accum_steps == 4
    assert "multiple of micro_batch_size 3" in refusal(load, "batch_size: 10", base)
    assert "exclude each other" in refusal(load, "batch_size: 8")


# --- the file itself


def test_malformed_yaml_names_line_and_column(load):
    message = refusal(load, "datasets: [a, b\nseed: 1\n", "base_model: x\n")
    assert "config.yml, line 3, column 5: not valid YAML" in message


def test_repeated_key(load):
    assert "'learning_rate' stands here a second time" in refusal(load, "learning_rate: 1e-4")


def test_missing_file(tmp_path):
    with pytest.raises(AutotuneError, match="no such file"):
        load_config(tmp_path / "none.yml")


def test_folder_and_bytes(tmp_path):
    with pytest.raises(AutotuneError, match="is a folder"):
        load_config(tmp_path)
    (tmp_path / "b.yml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(AutotuneError, match="not UTF-8"):
        load_config(tmp_path / "b.yml")


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just text\n"])
def test_no_mapping(load, text):
    assert "at the top level" in refusal(load, "", text)


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("context_parapllel_size: 2", "context_parallel_size"),
        ("gradient_acumulation_steps: 2", "gradient_accumulation_steps"),
        ("micro_batchsize: 2", "micro_batch_size"),
    ],
)
def test_unknown_key_names_the_nearest(load, key, near):
    message = refusal(load, key)
    assert f"unknown key `{key.split(':')[0]}`" in message
    assert near in message


def test_unknown_keys_are_named_together(load):
    message = refusal(load, "zzzz: 1\nsequence_length: 3\n")
    assert "`zzzz`" in message
    assert "`sequence_length` Nearest: sequence_len" in message


@pytest.mark.parametrize("missing", ["base_model", "learning_rate"])
def test_required_keys(load, missing):
    base = "".join(line for line in BASE.splitlines(True) if missing not in line)
    assert f"{missing} is missing" in refusal(load, "", base)


@pytest.mark.parametrize(
    "extra",
    [
        "sequence_len: 1.5", "sequence_len: many", "sequence_len: true", "sequence_len: 1",
        "sample_packing: 1", "weight_decay: -1", "weight_decay: .nan", "lr_scheduler: cosin",
        "optimizer: lion_8bit", "max_steps: 0", "bf16: full", "num_epochs: .inf",
        "context_parallel_size: 0", "output_dir: 3", "gradient_checkpointing: offload",
        "datasets: data.jsonl", "datasets: [data.jsonl]", "datasets: [{type: alpaca}]",
        "datasets: [{path: a, type: sharegpt}]", "datasets: [{path: a, feild: b}]",
        "test_datasets: [{path: a}]\nval_set_size: 0.1", "warmup_steps: 1\nwarmup_ratio: 0.1",
        "autotune: 3", "autotune: {num_gpus: none}", "autotune: {ladder: [{micro_batch_size: 0}]}",
        "pretraining_dataset: [{path: a, feild: b}]", "pretraining_dataset: 3",
        "train_on_inputs: 1", "excess_length_strategy: cut",
    ],
)  # fmt: skip
def test_bad_values_are_refused_with_their_key(load, extra):
    key = extra.split(":")[0]
    message = refusal(load, extra)
    assert key in message
    assert "config.yml" in message


@pytest.mark.parametrize("extra", ["fp16: true", "bfloat16: true", "load_in_4bit: true"])
def test_precision_that_is_not_run_here(load, extra):
    assert extra.split(":")[0] in refusal(load, extra)


@pytest.mark.parametrize(
    ("extra", "precision"),
    [
        ("bf16: auto", Precision.BF16),
        ("bf16: true", Precision.BF16),
        ("bf16: false", Precision.FP32),
        ("float32: true", Precision.FP32),
    ],
)
def test_precision(load, extra, precision):
    assert load(extra).workload.precision is precision


def test_lora(load):
    config = load("adapter: lora\nlora_r: 8\nlora_alpha: 16\nlora_target_linear: true\n")
    assert config.workload.adapter.r == 8
    assert len(config.workload.adapter.target_modules) == 7
    assert "lora_r and lora_alpha" in refusal(load, "adapter: lora")
    assert "lora_target_modules" in refusal(load, "adapter: lora\nlora_r: 8\nlora_alpha: 1")
    assert "Allowed: lora, qlora" in refusal(load, "adapter: llama-adapter")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("wandb_name: &a [*a]\n", "contains itself"),
        ("wandb_name: 2026-13-45\n", "cannot read"),
        ("wandb_name: " + "[" * 600 + "\n", "nested too deeply"),
        ("seed: " + "9" * 5000 + "\n", "cannot read"),
        ("seed: 1" + "0" * 400 + "\n", "seed"),
        ("fsdp_config: {1: 2}\n", "the key 1 is not text"),
        ("logging_steps: 1e300\n", "up to 9007199254740992"),
    ],
)
def test_what_yaml_can_hold_and_a_configuration_cannot(load, text, words):
    message = refusal(load, text)
    assert words in message
    assert len(message) < 2000


@pytest.mark.parametrize("name", ["~nobody/x", "a" * 5000, "x\\0y"])
def test_a_model_name_that_no_path_can_have(load, name):
    base = BASE.replace("tiny-qwen3", f'"{name}"')
    assert len(refusal(load, "", base)) < 15_000


def test_dataset_keys_that_would_change_the_training_are_refused(load):
    with pytest.raises(AutotuneError, match="roles_to_train is not used here with type alpaca"):
        load("datasets: [{path: a.jsonl, type: alpaca, roles_to_train: [a]}]")
    with pytest.raises(AutotuneError, match="message_field_training_detail, split_thinking are"):
        load(
            "datasets: [{path: a, type: chat_template, split_thinking: true, "
            "message_field_training_detail: d}]"
        )


# --- paths


def test_data_and_model_beside_the_file(tmp_path, monkeypatch, load):
    (tmp_path / "data.jsonl").write_text("{}")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = load("datasets: [{path: data.jsonl}, {path: other.jsonl}]")
    assert [Path(source.path) for source in config.datasets] == [
        tmp_path / "data.jsonl",
        Path("other.jsonl"),
    ]


def test_presets_are_listed():
    assert preset_names() == [
        "zero1.json", "zero1_torch_compile.json", "zero2.json", "zero2_cpuoffload.json",
        "zero3.json",
        "zero3_bf16.json", "zero3_bf16_cpuoffload_all.json", "zero3_bf16_cpuoffload_optimizer.json",
        "zero3_bf16_cpuoffload_params.json", "zero3_bf16_hpz.json",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "line",
    ["adam_beta1: 1.5", "adam_beta2: 1", "warmup_ratio: 5", "num_epochs: 0", "val_set_size: 1.5"],
)
def test_values_no_run_can_use(load, line):
    assert f"{line.partition(':')[0]}: {line.partition(' ')[2]} is not allowed" in refusal(
        load, line
    )
