"""The study folder belongs to one study and one search at a time."""

from __future__ import annotations

import argparse
import json
import shutil
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
    sampler="tpe",
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
        ({"sampler": "random"}, 'sampler is "tpe" there, "random" here'),
        ({"micro_batches": [1]}, "micro_batches is null there, [1] here"),
    ],
)
def test_any_other_contract_is_refused_and_nothing_is_touched(tmp_path, change, said):
    open_study(tmp_path, CONTRACT)
    (tmp_path / "trials.jsonl").write_text("{}\n")
    written = (tmp_path / "study.json").read_bytes()
    with pytest.raises(AutotuneError, match="holds another study") as caught:
        open_study(tmp_path, replace(CONTRACT, **change))
    assert said in str(caught.value)
    assert (tmp_path / "study.json").read_bytes() == written
    assert {path.name for path in tmp_path.iterdir()} == {"study.json", "trials.jsonl"}


@pytest.mark.parametrize("records", [None, ""])
def test_a_study_that_measured_nothing_is_replaced(tmp_path, records, caplog):
    """As after a first command with the wrong data; its launches tell why, and are kept."""
    open_study(tmp_path, CONTRACT)
    if records is not None:
        (tmp_path / "trials.jsonl").write_text(records)
    (tmp_path / "launches" / "0001-ddp").mkdir(parents=True)
    (tmp_path / "notes.txt").touch()
    before = (tmp_path / "study.json").read_text()
    other = replace(CONTRACT, seed=7)
    assert check_folder(tmp_path, other) is False
    assert (tmp_path / "study.json").read_text() == before, "a check touches nothing"
    assert open_study(tmp_path, other) is False
    assert open_study(tmp_path, other) is True
    assert (tmp_path / "replaced-1" / "study.json").read_text() == before
    assert (tmp_path / "replaced-1" / "launches" / "0001-ddp").is_dir()
    assert not (tmp_path / "launches").exists() and (tmp_path / "notes.txt").exists()
    assert "had measured nothing; its files are in" in caplog.text
    assert open_study(tmp_path, CONTRACT) is False
    assert (tmp_path / "replaced-2" / "study.json").exists()
    shutil.rmtree(tmp_path / "replaced-1")
    assert open_study(tmp_path, other) is False
    assert (tmp_path / "replaced-1" / "study.json").exists()


def change_a_file(folder: Path) -> None:
    (folder / "a.jsonl").write_text("another text")


def add_a_file(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "c.jsonl").write_text("more")


def move_a_file(folder: Path) -> None:
    (folder / "a.jsonl").rename(folder / "z.jsonl")


@pytest.mark.parametrize("path", ["data", "data/*.jsonl", "data/**/*.jsonl", "data/a.jsonl"])
@pytest.mark.parametrize("change", [change_a_file, add_a_file, move_a_file])
def test_changed_data_is_another_study(tmp_path, path, change):
    folder, study = tmp_path / "data", tmp_path / "study"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.jsonl").write_text(name)
    contract = replace(CONTRACT, datasets=[DatasetSource(path=str(tmp_path / path))])
    open_study(study, contract)
    (study / "trials.jsonl").write_text("{}\n")
    (folder / ".hidden").write_text("by an editor")
    assert open_study(study, contract) is True
    change(folder)
    contract = replace(contract)  # the next command makes its own
    if change is add_a_file and path in ("data/*.jsonl", "data/a.jsonl"):
        assert open_study(study, contract) is True, "the new file is not read"
        return
    with pytest.raises(AutotuneError, match="datasets is"):
        open_study(study, contract)


def test_a_study_inside_its_data_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    contract = replace(CONTRACT, datasets=[DatasetSource(path=str(tmp_path))])
    with pytest.raises(AutotuneError, match=r"lies in the data folder.*--out"):
        check_folder(Path("reports/study"), contract)


def test_a_changed_tokenizer_is_another_study(tmp_path):
    folder, study = tmp_path / "model", tmp_path / "study"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONTRACT.model.hf_config))
    (folder / "tokenizer.json").write_text("{}")

    def contract() -> Contract:
        return replace(CONTRACT, model=load_model(str(folder)))

    open_study(study, contract())
    (study / "trials.jsonl").write_text("{}\n")
    (folder / "model.safetensors").touch()  # a search draws random weights
    assert open_study(study, contract()) is True
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(AutotuneError, match=r"model\.tokenizer is"):
        open_study(study, contract())


def test_other_library_versions_are_another_study(tmp_path):
    open_study(tmp_path, CONTRACT)
    held = json.loads((tmp_path / "study.json").read_text())
    held["versions"]["torch"] = "1.0"
    (tmp_path / "trials.jsonl").write_text("{}\n")
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


def test_a_folder_below_a_file_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AutotuneError, match="no folder can be made there"):
        with locked(tmp_path / "file" / "study"):
            pass


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
    from autotune.cli.search_contract import contract_of, contract_words
    from autotune.cli.search_flags import add_arguments

    monkeypatch.chdir(tmp_path)
    Path("corpus.txt").write_text("some words\n")
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = "--model tiny-qwen3 --gpus 2 --device cpu --seq-len 512".split()
    contract, _ = contract_of(parser.parse_args([*args, *flags]))
    open_study(Path("study"), contract)
    held = json.loads(Path("study/study.json").read_text())
    assert held["workload"]["mean_document_tokens"] == tokens
    assert words in contract_words(contract, Path("study"), False, 3)


def test_large_data_is_read_once(tmp_path, monkeypatch):
    data = tmp_path / "a.jsonl"
    data.write_text('{"text": "a"}\n')
    read = []
    monkeypatch.setattr("autotune.search.study.data_digest", lambda path: read.append(path) or "d")
    contract = replace(CONTRACT, datasets=[DatasetSource(path=str(data))])
    assert not check_folder(tmp_path / "study", contract)
    open_study(tmp_path / "study", contract)
    assert check_folder(tmp_path / "study", contract)
    assert read == [str(data)]
