"""What `--data` makes of a path, without the training stack."""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

import pytest

from autotune.cli.data import add_data_arguments, dataset_from
from autotune.errors import AutotuneError
from autotune.trial.data_counts import DataCounts, SourceCounts


def source_of(*words: object):
    parser = argparse.ArgumentParser()
    add_data_arguments(parser)
    return dataset_from(parser.parse_args([str(word) for word in words]))


TALK = {"conversations": [{"from": "human", "value": "a"}]}
ROWS = {
    "completion": {"text": "a"},
    "alpaca": {"instruction": "a", "output": "b"},
    "chat_template": {"messages": []},
    "input_output": {"segments": []},
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz"])
def test_the_type_is_told_from_the_columns(tmp_path: Path, kind: str, name: str) -> None:
    text = json.dumps(ROWS[kind])
    content = (f"\ufeff\n [\n{text}]" if name == "a.json" else f"\n{text}\n").encode()
    file = tmp_path / name
    file.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    for given in (file, tmp_path, tmp_path / "*"):
        source = source_of("--data", given)
        assert (source.path, source.type) == (str(given), kind)


def test_conversations_bring_their_own_names(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(TALK))
    source = source_of("--data", tmp_path / "a.jsonl")
    assert (source.type, source.field_messages) == ("chat_template", "conversations")
    assert source.message_property_mappings == {"role": "from", "content": "value"}


def test_a_csv_s_header_tells_the_type(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id,"instruction",output\n1,a,b\n')
    assert source_of("--data", tmp_path / "a.csv").type == "alpaca"


def test_what_cannot_be_looked_into_is_text_unless_said(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    assert source_of("--data", tmp_path / "a.parquet").type == "completion"
    assert source_of("--data", tmp_path / "a.parquet", "--data-type", "gpteacher").type == (
        "gpteacher"
    )
    source = source_of("--data", "owner/name-v1.0")
    assert (source.path, source.type) == ("owner/name-v1.0", "completion")
    assert source_of() is None


def test_a_template_by_name_or_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(ROWS["chat_template"]))
    (tmp_path / "own.jinja").write_text("{{ messages }}")
    named = source_of("--data", tmp_path / "a.jsonl", "--chat-template", "llama3")
    assert named.chat_template == "llama3"
    own = source_of("--data", tmp_path / "a.jsonl", "--chat-template", tmp_path / "own.jinja")
    assert (own.chat_template, own.chat_template_jinja) == ("jinja", "{{ messages }}")


WRONG = {
    "missing": (None, [], "There is no"),
    "other columns": ({"prompt": "a", "answer": "b"}, [], "columns answer, prompt; one of text"),
    "not JSON": ("\n{'a': 1}", [], "line 2 is not JSON"),
    "no objects": ("[3]", [], "no JSON objects"),
    "empty": ("", [], r"columns \(none\)"),
    "a template for text": (ROWS["completion"], ["--chat-template", "chatml"], "no effect"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_data_is_refused(tmp_path: Path, name: str) -> None:
    content, more, said = WRONG[name]
    file = tmp_path / "a.jsonl"
    if content is not None:
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(AutotuneError, match=said):
        source_of("--data", file, *more)


DAMAGED = bytearray(gzip.compress(b'{"text": "a"}' * 99))
DAMAGED[10] ^= 0xFF


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl.gz", bytes(DAMAGED), "cannot be read"),
        ("a.csv", b'id,"' + b"a" * 200_000, "is not CSV"),
        ("a.jsonl", b'{"text": ' + b"1" * 5000 + b"}", "first row cannot be read"),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000, "first row cannot be read"),
    ],
    ids=["archive", "csv", "digits", "nested"],
)
def test_what_python_s_readers_refuse_is_one_message(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AutotuneError, match=said):
        source_of("--data", tmp_path / name)


def test_flags_that_need_data() -> None:
    for flag, value in (("--data-type", "alpaca"), ("--chat-template", "chatml")):
        with pytest.raises(AutotuneError, match=f"{flag} says how to read --data"):
            source_of(flag, value)


def test_the_counts_in_one_line() -> None:
    first = SourceCounts(path="a", type="alpaca", rows=1200, tokens=5000, trained_tokens=900)
    second = SourceCounts(path="b", type="completion", rows=30, tokens=100, trained_tokens=99)
    for source, reason in ((first, "a duplicate"), (first, "nothing to train on"),
                           (second, "a duplicate")):  # fmt: skip
        source.drop(reason)
    counts = DataCounts(
        train=[first, second], sequences=40, held_out_sequences=4, seq_len=2048, padding_share=0.125
    )
    assert counts.words() == (
        "1,230 rows read, 2 left out (a duplicate), 1 left out (nothing to train on), 5,100 tokens,"
        " 999 of them trained on, 40 sequences of 2,048 and 4 held out, 12.5% padding"
    )
    second.complete = False
    assert counts.words().startswith("1,230 rows read (enough, not all), 2 left out")
