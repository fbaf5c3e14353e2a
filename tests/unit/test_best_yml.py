"""best.yml trains what the search measured fastest: that plan, workload, data, seed and model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from autotune.config import load_config
from autotune.report.outputs import Outputs
from autotune.search.study import Contract, open_study
from autotune.spec.hardware import load_hardware
from autotune.spec.model import load_model
from autotune.spec.training import DatasetSource
from autotune.spec.workload import Precision, Workload
from autotune.trial.protocol import Outcome
from tests.unit.report_studies import make_failure, make_plan, make_record, write_study

STOPPED = SimpleNamespace(because="all were tried", launches=3, elapsed_s=1.0)


def contract(name: str = "tiny-llama", **changes) -> Contract:
    base = Contract(
        model=load_model(name),
        base_model=name,
        workload=Workload(
            seq_len=384, global_batch_size=64, precision=Precision.FP32, optimizer="sgd",
            packing=True,
        ),
        hardware=load_hardware("cpu", 2),
        device="cpu",
        strategies=["zero2", "fsdp2"],
        micro_batches=None,
        cp_degrees=[1],
        recompute=["none"],
        memory_limit_bytes=None,
        datasets=[DatasetSource(path="Org/data", type="alpaca")],
        seed=7,
        sampler="tpe",
    )  # fmt: skip
    return replace(base, **changes)


def best_of(study: Path, searched: Contract, records) -> Path:
    open_study(study, searched)
    written = (study / "study.json").read_text()
    write_study(study, records, best_yml=None)
    (study / "study.json").write_text(written)
    Outputs(study, searched, [], seed=searched.seed).write(STOPPED, final=False)
    return study / "best.yml"


RECORDS = [
    make_record(make_plan("zero2", 8), step_s=3.0),
    make_failure(make_plan("zero2", 16)),
    make_record(make_plan("fsdp2", 4), step_s=2.0, launch=2),
    make_record(make_plan("fsdp2", 2), step_s=2.5, launch=2),
    make_record(make_plan("fsdp2", 8), step_s=1.0, launch=2, outcome=Outcome.THRASH),
]


def test_best_yml_is_what_was_fastest(tmp_path):
    searched = contract()
    path = best_of(tmp_path / "study", searched, RECORDS)
    config = load_config(path)
    fastest = RECORDS[2]
    assert config.autotune.plan_id == config.plan(2).id == fastest.plan_id
    assert config.autotune.measured["tokens_per_s"] == fastest.tokens_per_s
    assert json.loads((path.parent / "summary.json").read_text())["best"]["plan"] == fastest.plan
    assert config.workload_on(2) == config.workload == searched.workload
    assert list(config.datasets) == searched.datasets
    assert (config.seed, config.num_gpus, config.autotune.device) == (7, 2, "cpu")
    assert config.model.hf_config == searched.model.hf_config


@pytest.mark.parametrize("files", [(), ("model.safetensors", "tokenizer.json")])
def test_best_yml_of_a_folder_named_like_a_model_of_the_catalogue(
    files, tmp_path, monkeypatch, caplog
):
    """It must neither search the catalogue's shape nor train the catalogue's weights."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "qwen3-1.7b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(load_model("tiny-llama").hf_config))
    for name in files:
        (folder / name).touch()
    searched = contract("qwen3-1.7b")
    assert "qwen3-1.7b is a folder here" in caplog.text
    assert searched.model.hf_config == load_model("tiny-llama").hf_config
    path = best_of(tmp_path / "study", searched, RECORDS)
    monkeypatch.chdir(path.parent)
    config = load_config(path)
    assert config.base_model == str(folder)
    assert config.model == searched.model
    assert config.model.weights == (str(folder) if files else None)


def test_best_yml_of_a_relative_folder_or_config_trains_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    file = tmp_path / "models" / "mine.json"
    file.write_text(json.dumps(load_model("tiny-llama").hf_config))
    path = best_of(tmp_path / "study", contract("models/mine.json"), RECORDS)
    monkeypatch.chdir(path.parent)
    assert load_config(path).base_model == str(file)


@pytest.mark.parametrize("written", ["qwen3-1.7b", "Qwen/Qwen3-1.7B"])
def test_a_published_model_in_a_file_means_its_weights(written, tmp_path, monkeypatch):
    """By whichever name: `best.yml` of a search by catalogue name says the Hub id."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "run.yml"
    file.write_text(f"base_model: {written}\nlearning_rate: 1e-4\n")
    assert load_config(file).model.weights == "Qwen/Qwen3-1.7B"
    searched = contract("qwen3-1.7b")
    assert searched.model.weights is None, "a search needs the shape alone"
    assert load_config(best_of(tmp_path / "study", searched, RECORDS)).model.weights == (
        "Qwen/Qwen3-1.7B"
    )
