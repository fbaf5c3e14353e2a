"""Numbers on the command line: what no run can use is refused before anything starts."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from autotune.cli import _guarded, search, train
from autotune.cli.options import held_out, positive_number, seed_number


@pytest.mark.parametrize(
    ("read", "good"),
    [
        (seed_number, {"0": 0, "42": 42, "4294967295": 2**32 - 1}),
        (positive_number, {"2e-5": 2e-5, "1": 1.0}),
        (held_out, {"0": 0.0, "0.05": 0.05, "1": 1.0, "200": 200.0, "2e2": 200.0}),
    ],
)
def test_what_is_taken(read, good):
    assert {text: read(text) for text in good} == good


@pytest.mark.parametrize(
    ("flag", "text"),
    [
        *[("--seed", text) for text in ("-1", "4294967296", "1.5", "nan", "")],
        *[("--learning-rate", text) for text in ("nan", "inf", "-1", "0", "1e999", "fast")],
        *[("--val-set-size", text) for text in ("nan", "inf", "-1", "-0.1", "1.5", "some")],
    ],
)
def test_what_is_refused_by_the_verb(flag, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = (
        ["search", "--model", "tiny-qwen3", "--gpus", "1", "--device", "cpu"]
        if flag == "--seed"
        else ["train", "run.yml"]
    )
    with pytest.raises(SystemExit) as ended:
        _guarded([*arguments, f"{flag}={text}"])
    assert ended.value.code == 2
    assert f"argument {flag}: {text!r} is n" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seed", [-1, 2**32, 0.5])
def test_a_seed_in_a_file_has_the_same_range(seed, tmp_path, capsys):
    file = tmp_path / "run.yml"
    file.write_text(
        f"base_model: tiny-qwen3\nlearning_rate: 1e-4\ndatasets: [{{path: a/b}}]\nseed: {seed}\n"
    )
    assert _guarded(["train", str(file), "--device", "cpu"]) == 2
    assert f"seed: {seed} is not allowed here" in capsys.readouterr().err


def test_held_out_twice_is_refused_before_ranks_start(tmp_path: Path, capsys):
    file = tmp_path / "run.yml"
    values = {
        "base_model": "tiny-qwen3", "learning_rate": 1e-4, "output_dir": str(tmp_path / "out"),
        "datasets": [{"path": "a/b"}], "test_datasets": [{"path": "a/c"}],
    }  # fmt: skip
    file.write_text(json.dumps(values))
    assert _guarded(["train", str(file), "--device", "cpu", "--val-set-size", "5"]) == 2
    assert "has test_datasets" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [file]


def test_the_verbs_use_these_readers():
    parser = argparse.ArgumentParser()
    search.add_arguments(parser)
    train_parser = argparse.ArgumentParser()
    train.add_arguments(train_parser)
    readers = {a.dest: a.type for a in (*parser._actions, *train_parser._actions)}
    assert float not in readers.values() and int not in readers.values()
