"""Times measured by one study start the next one better, and old files still load."""

from dataclasses import replace

import numpy as np
import pytest

from autotune.calibrate.knowledge import known_times, time_fields, timer_of
from autotune.calibrate.residual import TimeResidual
from autotune.memory.fingerprint import machine_fingerprint
from autotune.memory.knowledge import Entry, KnowledgeBase
from autotune.memory.residuals import Ruler
from autotune.planner import make_plan
from autotune.spec.hardware import load_hardware
from autotune.spec.strategy import load_strategies
from autotune.timing import Calibration

STRATEGY = next(s for s in load_strategies() if s.name == "zero2")
MACHINE = machine_fingerprint("cpu")
TIMER = timer_of(None)


def plan_of(micro):
    return replace(make_plan(STRATEGY, load_hardware("cpu", 2)), micro_batch_size=micro)


def entry(micro=1, machine=MACHINE, **more):
    plan = plan_of(micro)
    values = {
        "fingerprint": machine.to_dict(), "ruler": Ruler.CPU, "model": "m", "plan_id": plan.id,
        "workload": "w", "engine": "zero2", "recompute": "none", "predicted_bytes": 10,
        "real_bytes": 12,
    }  # fmt: skip
    return Entry(**(values | more))


def timed(micro=1, ratio=1.5, timer=TIMER, **more):
    return entry(micro, **time_fields(plan_of(micro), 2.0, 2.0 * ratio, timer), **more)


def test_a_study_starts_where_the_last_one_ended(tmp_path):
    base = KnowledgeBase(tmp_path)
    base.add([timed(1), timed(2)])
    rows = known_times(base, MACHINE, TIMER)
    assert [row.measured_s for row in rows] == [3.0, 3.0]
    assert not any(row.here for row in rows)
    mean, _ = TimeResidual(rows).predict([plan_of(4)])
    assert mean[0] == pytest.approx(np.log(1.5), abs=0.05)


def test_what_was_predicted_otherwise_does_not_count(tmp_path):
    base = KnowledgeBase(tmp_path)
    other = replace(MACHINE, libraries="torch 1.0")
    base.add([timed(1, timer="other"), timed(2, machine=other), entry(4)])
    assert known_times(base, MACHINE, TIMER) == []
    # How memory is predicted says nothing about speed.
    base.add([timed(8, machine=replace(MACHINE, estimator="new"))])
    assert len(known_times(base, MACHINE, TIMER)) == 1


def test_files_of_older_versions_load(tmp_path):
    base = KnowledgeBase(tmp_path)
    old = entry().model_dump_json(exclude={"plan", "predicted_step_s", "measured_step_s", "timer"})
    base.path.write_text(old + "\n")
    assert base.entries() == [entry()]
    base.add([timed(2)])
    assert len(base.entries()) == 2
    assert len(known_times(base, MACHINE, TIMER)) == 1
    assert known_times(None, MACHINE, TIMER) == []


def test_plans_of_another_version_are_left_out(tmp_path):
    base = KnowledgeBase(tmp_path)
    base.add([timed(1).model_copy(update={"plan": {"engine": "new"}})])
    assert known_times(base, MACHINE, TIMER) == []


def test_another_calibration_is_another_timer():
    swept = Calibration(
        device="cpu", num_ranks=2, threads=1, fingerprint={}, recorded_at="a", duration_s=1
    )
    again = swept.model_copy(update={"recorded_at": "b"})
    assert len({timer_of(None), timer_of(swept), timer_of(again)}) == 3
