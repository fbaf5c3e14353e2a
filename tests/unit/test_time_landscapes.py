"""Landscapes are read and scored: on a machine of known law the errors are the planted ones."""

import csv
import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from autotune.planner import make_plan
from autotune.spec.model import load_model
from autotune.spec.strategy import load_strategies
from autotune.spec.workload import Workload
from autotune.timing import Calibration, estimate_time
from autotune.timing.calibration import CollectiveCurve

FOLDER = Path(__file__).parents[2] / "benchmarks" / "time"
WORKLOAD = Workload(seq_len=256, global_batch_size=8)
FIELDS = ["round", "family", "plan", "outcome", "step_times_s"]


@pytest.fixture(scope="module")
def module():
    sys.path.insert(0, str(FOLDER))
    # benchmarks/memory has a module of this name as well.
    other = sys.modules.pop("published", None)
    try:
        spec = importlib.util.spec_from_file_location("time_landscapes", FOLDER / "landscapes.py")
        found = importlib.util.module_from_spec(spec)
        sys.modules["time_landscapes"] = found
        spec.loader.exec_module(found)
        return found
    finally:
        sys.path.remove(str(FOLDER))
        sys.modules.pop("published", None)
        if other is not None:
            sys.modules["published"] = other


def story():
    return {
        "model": {"name": "tiny-qwen3"},
        "workload": WORKLOAD.model_dump(mode="json"),
        "hardware": {
            "device": "cpu", "gpu": "cpu", "ranks": 2, "num_nodes": 1, "gpus_per_node": 2,
            "inter_node_bytes_per_s": 1e9,
        },
    }  # fmt: skip


def swept():
    curves = tuple(
        CollectiveCurve(kind=kind, ranks=2, num_bytes=(1e3, 1e7), times_s=(1e-2, 1e-1))
        for kind in ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")
    )
    return Calibration(
        device="cpu", num_ranks=2, threads=1, fingerprint={}, recorded_at="", duration_s=1,
        collectives=curves,
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path, module):
    """A landscape whose truth is the calibrated prediction times 1.2, and 2 for ZeRO-3."""
    hardware = module.hardware_of(story())
    model, rows = load_model("tiny-qwen3"), []
    for strategy in load_strategies(["zero1", "zero2", "zero3", "fsdp2", "ddp"]):
        for micro in (1, 2, 4):
            plan = replace(
                make_plan(strategy, hardware), micro_batch_size=micro, grad_accum_steps=4 // micro
            )
            time = estimate_time(model, WORKLOAD, plan, hardware, swept()).step_s
            time *= 2.0 if strategy.name == "zero3" else 1.2
            values = {"family": strategy.name, "plan": json.dumps(plan.to_dict()), "outcome": "ok"}
            for number in (1, 2):
                steps = [1e9, time * (0.99, 1.01)[number - 1], 0.0]
                rows.append(values | {"round": number, "step_times_s": json.dumps(steps)})
            rows.append(values | {"round": 0, "step_times_s": "[1e6]"})
    rows.append(values | {"round": 1, "outcome": "oom", "step_times_s": "[]"})
    with (tmp_path / "known.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "known.json").write_text(json.dumps(story()))
    (tmp_path / "known.calibration.json").write_text(swept().model_dump_json())
    return tmp_path


def test_planted_errors_are_found(module, folder):
    (landscape,) = module.read_landscapes(folder)
    predictions = module.predict(landscape)
    assert len(landscape.plans) == 15
    ratio = predictions[module.CALIBRATED] / landscape.step_s
    zero3 = np.array([family == "zero3" for family in landscape.families])
    assert ratio[zero3] == pytest.approx(1 / 2.0)
    assert ratio[~zero3] == pytest.approx(1 / 1.2)
    assert module.figures(landscape, predictions[module.CALIBRATED])[0] == pytest.approx(1 / 6)
    # Other families tell what they share; what is one family's own they cannot know.
    refitted = predictions[module.REFITTED] / landscape.step_s
    assert refitted[~zero3] == pytest.approx(1, abs=0.25)
    assert (refitted[zero3] < 0.8).all()
    formulas = module.figures(landscape, predictions[module.FORMULAS])
    assert formulas[0] > 0.3


def test_ranks_share_a_tie(module):
    from time_landscapes import spearman

    assert spearman(np.array([1, 2, 3]), np.array([10.0, 20, 30])) == pytest.approx(1)
    assert spearman(np.array([1, 2, 3]), np.array([3.0, 2, 1])) == pytest.approx(-1)
    # Mean ranks 0.5, 0.5, 2 against 0, 1, 2: 1.5 / sqrt(1.5 * 2).
    assert spearman(np.array([1, 1, 2]), np.array([1.0, 2, 3])) == pytest.approx(0.75**0.5)


def test_the_benchmark_says_short(module, folder, monkeypatch, capsys, tmp_path):
    pytest.importorskip("matplotlib")  # the base install is without
    out, plot = tmp_path / "out.csv", tmp_path / "plot.png"
    monkeypatch.setattr(sys, "argv", ["x", str(folder), "--out", str(out), "--plot", str(plot)])
    assert module.main() == 1
    said = capsys.readouterr().out
    assert "short: known, calibrated" in said
    assert plot.stat().st_size > 1000
    assert len(out.read_text().splitlines()) == 4
