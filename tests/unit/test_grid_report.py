import csv
import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from autotune.planner import estimate_plan
from autotune.spec.hardware import load_hardware
from autotune.spec.model import load_model
from autotune.spec.workload import Workload
from autotune.trial.protocol import Outcome
from tests.unit.report_studies import make_plan, make_record

_FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "grid_report.py"
_SPEC = importlib.util.spec_from_file_location("grid_report", _FILE)
grid_report = importlib.util.module_from_spec(_SPEC)
sys.modules["grid_report"] = grid_report
_SPEC.loader.exec_module(grid_report)


@pytest.fixture
def estimate():
    plan = replace(make_plan("fsdp2"), dp_shard=1, micro_batch_size=1, grad_accum_steps=8)
    workload = Workload(seq_len=512, global_batch_size=8)
    return estimate_plan(load_model("qwen3-0.6b"), workload, plan, load_hardware("h200-sxm", 1))


def row(estimate, **changes):
    record = replace(make_record(estimate.plan), **changes)
    return grid_report.row_of(record, estimate, changes.pop("device", "cuda"), False, 0)


def test_the_allocators_peak_is_held_against_the_allocators_part(estimate):
    outside = estimate.memory.components["framework"]
    assert outside > 0
    measured = estimate.memory.total_bytes - outside
    found = row(estimate, peak_allocated_bytes=measured)
    assert found["predicted_bytes"] == measured
    assert found["memory_error"] == 0


def test_an_error_is_positive_where_the_prediction_is_too_large(estimate):
    found = row(
        estimate,
        peak_allocated_bytes=estimate.memory.allocator_bytes // 2,
        step_s=estimate.time.step_s * 2,
    )
    assert found["memory_error"] == pytest.approx(1, rel=1e-6)
    assert found["time_error"] == pytest.approx(-0.5)


def test_what_ran_out_of_memory_has_no_error(estimate):
    found = row(estimate, outcome=Outcome.OOM, step_s=None, peak_allocated_bytes=10)
    assert found["memory_error"] is None and found["time_error"] is None


def rows_with(errors):
    return [
        {"strategy": name, "adapter": "", "recompute": "none", "memory_error": m, "time_error": t}
        for name, m, t in errors
    ]


def test_the_mean_absolute_error_does_not_cancel():
    lines = grid_report.summarise(
        rows_with([("ddp", 0.2, 0.1), ("ddp", -0.2, None), ("zero2", None, None)])
    )
    by_name = {line["configurations"]: line for line in lines}
    assert set(by_name) == {"ddp none", "zero2 none", "all"}
    assert by_name["ddp none"]["mean_absolute_memory_error"] == pytest.approx(0.2)
    assert by_name["ddp none"]["median_memory_error"] == pytest.approx(0)
    assert by_name["ddp none"]["num_time_errors"] == 1
    assert by_name["zero2 none"]["mean_absolute_memory_error"] is None
    assert by_name["all"]["num_memory_errors"] == 2


def test_nothing_measured_is_no_error(capsys):
    assert grid_report.summarise([]) == []
    grid_report.print_errors(grid_report.summarise(rows_with([("ddp", None, None)])))
    assert "-" in capsys.readouterr().out.splitlines()[-1]


def test_files(tmp_path, estimate):
    found = row(estimate)
    grid_report.write_outputs(tmp_path, {"rows": [found]})
    with (tmp_path / "grid.csv").open() as file:
        (read,) = csv.DictReader(file)
    assert read["strategy"] == "fsdp2" and float(read["step_s"]) == found["step_s"]
    assert json.loads((tmp_path / "grid.json").read_text())["rows"] == [found]
