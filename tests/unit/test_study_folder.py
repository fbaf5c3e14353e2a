"""The study folder belongs to one study and one search at a time."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest

from autotune.errors import AutotuneError
from autotune.search.study import Contract, check_folder, locked, open_study
from autotune.spec.hardware import load_hardware
from autotune.spec.model import load_model
from autotune.spec.training import DatasetSource
from autotune.spec.workload import Workload

CONTRACT = Contract(
    seed=42,
    model=load_model("tiny-qwen3"),
    base_model="tiny-qwen3",
    workload=Workload(),
    hardware=load_hardware("cpu", 2),
    device="cpu",
    strategies=["ddp"],
    micro_batches=None,
    cp_degrees=[1, 2],
    recompute=["none"],
    memory_limit_bytes=None,
    datasets=[],
)


def test_the_same_contract_resumes(tmp_path: Path):
    folder = tmp_path / "study"
    assert check_folder(folder, CONTRACT) is False and not folder.exists()
    assert open_study(folder, CONTRACT) is False
    written = (folder / "study.json").read_bytes()
    assert open_study(folder, CONTRACT) is True
    assert (folder / "study.json").read_bytes() == written


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"workload": Workload(seq_len=1024)}, "workload.seq_len is 2048 there, 1024 here"),
        ({"memory_limit_bytes": 5}, "memory_limit_bytes is null there, 5 here"),
        ({"strategies": ["ddp", "zero1"]}, "strategies is"),
        ({"model": load_model("tiny-llama")}, "model."),
        ({"hardware": load_hardware("cpu", 4)}, "hardware."),
        ({"datasets": [DatasetSource(path="x")]}, "datasets is [] there"),
        ({"recompute": ["none", "full"]}, "recompute is"),
        ({"micro_batches": [1]}, "micro_batches is null there, [1] here"),
    ],
)
def test_any_other_contract_is_refused_and_nothing_is_touched(tmp_path, change, said):
    open_study(tmp_path, CONTRACT)
    written = (tmp_path / "study.json").read_bytes()
    with pytest.raises(AutotuneError, match="holds another study") as caught:
        open_study(tmp_path, replace(CONTRACT, **change))
    assert said in str(caught.value)
    assert (tmp_path / "study.json").read_bytes() == written
    assert [path.name for path in tmp_path.iterdir()] == ["study.json"]


def test_other_library_versions_are_another_study(tmp_path):
    open_study(tmp_path, CONTRACT)
    held = json.loads((tmp_path / "study.json").read_text())
    held["versions"]["torch"] = "1.0"
    (tmp_path / "study.json").write_text(json.dumps(held))
    with pytest.raises(AutotuneError, match=r'versions\.torch is "1\.0" there'):
        open_study(tmp_path, CONTRACT)


def test_a_folder_with_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(AutotuneError, match="holds no study"):
        check_folder(tmp_path, CONTRACT)


def test_a_file_is_refused(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(AutotuneError, match="is a file"):
        check_folder(file, CONTRACT)


@pytest.mark.parametrize("text", ["", "[]", '{"a":'])
def test_a_study_that_cannot_be_read_is_refused(tmp_path, text):
    (tmp_path / "study.json").write_text(text)
    with pytest.raises(AutotuneError, match=r"study\.json is not"):
        check_folder(tmp_path, CONTRACT)


def test_one_search_at_a_time(tmp_path):
    with (
        locked(tmp_path / "new"),
        pytest.raises(AutotuneError, match="Another search"),
        locked(tmp_path / "new"),
    ):
        pass
    with locked(tmp_path / "new"):
        assert open_study(tmp_path / "new", CONTRACT) is False


@pytest.mark.parametrize(
    ("flags", "tokens", "words"),
    [
        ([], 128, "synthetic documents of 128 tokens on average"),
        (["--data", "corpus.txt"], None, "corpus.txt"),
    ],
)
def test_the_study_says_how_long_its_synthetic_documents_are(
    flags, tokens, words, tmp_path, monkeypatch
):
    from autotune.cli import search

    monkeypatch.chdir(tmp_path)
    Path("corpus.txt").write_text("some words\n")
    parser = argparse.ArgumentParser()
    search.add_arguments(parser)
    args = "--model tiny-qwen3 --gpus 2 --device cpu --seq-len 512".split()
    contract = search._contract(parser.parse_args([*args, *flags]))
    open_study(Path("study"), contract)
    held = json.loads(Path("study/study.json").read_text())
    assert held["workload"]["mean_document_tokens"] == tokens
    assert words in search._contract_words(contract, Path("study"), False, 3)
