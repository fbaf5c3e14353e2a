"""The residual recovers planted offsets, and without data it moves nothing."""

from dataclasses import replace

import numpy as np
import pytest

from autotune.calibrate.residual import TimeResidual, TimeRow
from autotune.plan import Recompute
from autotune.planner import make_plan
from autotune.spec.hardware import load_hardware
from autotune.spec.strategy import load_strategies

CPU = load_hardware("cpu", 2)
STRATEGIES = {s.name: s for s in load_strategies()}
NAMES = ("zero1", "zero2", "zero3", "fsdp2")


def plan(name, micro=1, steps=4, recompute=Recompute.NONE, cp=1):
    made = make_plan(STRATEGIES[name], CPU, cp=cp, recompute=recompute)
    return replace(made, micro_batch_size=micro, grad_accum_steps=steps)


def test_without_data_nothing_moves():
    plans = [plan(name, micro=2**n) for n, name in enumerate(NAMES)]
    mean, sd = TimeResidual().predict(plans)
    assert (mean == 0).all()
    assert (sd > 0.2).all()
    assert TimeResidual().predict([])[0].shape == (0,)


def test_planted_offsets_are_recovered():
    shared, engines = 0.3, {"zero1": -0.1, "zero2": 0.05, "zero3": 0.15, "fsdp2": -0.05}
    residual = TimeResidual()
    for name, own in engines.items():
        for micro in (1, 2, 4):
            residual.learn(plan(name, micro, 8 // micro), 1.0, np.exp(shared + own))
    unseen = [plan(name, 2, 4, Recompute.NONE, cp=1) for name in NAMES]
    mean, sd = residual.predict(unseen)
    assert mean == pytest.approx([shared + engines[name] for name in NAMES], abs=0.02)
    assert (sd < 0.05).all()
    assert residual.corrected_s(unseen[:1], np.array([2.0])) == pytest.approx(
        2 * np.exp(0.2), rel=0.03
    )


def test_a_trial_moves_its_own_kind_most_and_the_others_by_what_they_share():
    residual = TimeResidual()
    residual.learn(plan("zero2"), 1.0, 1.5)
    mean, sd = residual.predict(
        [plan("zero2"), plan("zero2", micro=8, steps=1), plan("zero3"), plan("zero3", cp=2)]
    )
    assert mean[0] > mean[1] > mean[3] > 0
    assert mean[0] > mean[2] > mean[3] > 0
    assert mean[0] == pytest.approx(np.log(1.5), abs=0.02)
    assert sd[0] < sd[1] < sd[3]
    before = TimeResidual().predict([plan("zero3", cp=2)])[1]
    assert sd[3] < before[0]


def test_a_disturbed_trial_does_not_carry_the_rest():
    residual = TimeResidual()
    for micro in (1, 2, 4, 8):
        residual.learn(plan("zero2", micro, 8 // micro), 1.0, 1.2)
    residual.learn(plan("zero2", 16, 1), 1.0, 6.0)
    mean, _ = residual.predict([plan("zero2", 2, 4)])
    assert mean[0] == pytest.approx(np.log(1.2), abs=0.05)


@pytest.mark.parametrize("measured", [0.0, -1.0, float("nan"), float("inf")])
def test_what_is_no_time_is_left(measured):
    residual = TimeResidual()
    residual.learn(plan("zero2"), 1.0, measured)
    residual.learn(plan("zero2"), measured, 1.0)
    assert residual.count == 0


def test_a_repeated_trial_replaces_what_was_known():
    residual = TimeResidual()
    for _ in range(50):
        residual.learn(plan("zero2"), 1.0, 1.4)
    assert residual.count == 1
    residual.learn(plan("zero2"), 1.0, 1.0)
    assert residual.predict([plan("zero2")])[0] == pytest.approx([0.0], abs=1e-9)


def test_earlier_studies_start_it_and_this_one_decides():
    earlier = [
        TimeRow(plan=plan(name), predicted_s=1.0, measured_s=1.5, here=False) for name in NAMES
    ]
    residual = TimeResidual(earlier)
    assert residual.predict([plan("zero3", 2, 2)])[0][0] == pytest.approx(np.log(1.5), abs=0.05)
    for name in NAMES:
        residual.learn(plan(name), 1.0, 1.1)
    assert residual.count == 8
    assert residual.predict([plan("zero3")])[0][0] == pytest.approx(np.log(1.1), abs=0.03)
