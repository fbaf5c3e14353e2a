"""A verdict is a probability: of the device and of the first node's host."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from autotune.memory import Verdict, fit_probability, verdict
from autotune.memory.peak import Peak
from autotune.memory.residuals import Residual
from autotune.spec.hardware import load_hardware
from autotune.units import GIB

HARDWARE = load_hardware("h100-sxm", 8, 64 * GIB)
MEASURED = Residual(source="test", count=30, bias=0.1, scale=0.02, degrees=30.0)
PEAK = Peak(
    total_bytes=52 * GIB, framework_bytes=2 * GIB, host_bytes=0, gather_host_bytes=0,
    residual=MEASURED,
)  # fmt: skip


def test_the_bias_and_the_interval_leave_the_framework_alone():
    assert PEAK.measurable_bytes == 50 * GIB
    assert PEAK.expected_bytes == pytest.approx((2 + 50 * math.exp(0.1)) * GIB, abs=2)
    low, high = PEAK.interval_bytes
    half = 1.697 * 0.02
    assert low == pytest.approx((2 + 50 * math.exp(0.1 - half)) * GIB, rel=1e-4)
    assert high == pytest.approx((2 + 50 * math.exp(0.1 + half)) * GIB, rel=1e-4)


@pytest.mark.parametrize(
    ("standard_deviations", "chance", "name"),
    [(0, 0.5, "at_risk"), (1.697, 0.95, "fits"), (-1.697, 0.05, "oom"), (1.0, 0.837, "at_risk")],
)
def test_the_chance_is_that_of_students_t(standard_deviations, chance, name):
    room = 2 + 50 * math.exp(0.1 + standard_deviations * 0.02)
    at = replace(HARDWARE, gpu=replace(HARDWARE.gpu, memory_bytes=int(room * GIB)))
    assert fit_probability(PEAK, at) == pytest.approx(chance, abs=0.002)
    assert verdict(fit_probability(PEAK, at)) is Verdict(name)


def test_a_device_smaller_than_its_framework_has_no_chance():
    at = replace(HARDWARE, gpu=replace(HARDWARE.gpu, memory_bytes=GIB))
    assert fit_probability(PEAK, at) == 0


def test_the_host_is_a_nodes_and_saving_counts():
    small = replace(PEAK, total_bytes=10 * GIB)
    host = HARDWARE.host_memory_bytes
    assert fit_probability(small, HARDWARE) > 0.99
    a_rank = replace(small, host_bytes=host // 8)
    assert a_rank.node_host_bytes(8) == pytest.approx(host, abs=8)
    assert fit_probability(a_rank, HARDWARE) == pytest.approx(0.5, abs=0.001)
    assert fit_probability(replace(small, host_bytes=host // 16), HARDWARE) > 0.99
    saving = replace(small, host_bytes=host // 16, gather_host_bytes=host)
    assert verdict(fit_probability(saving, HARDWARE)) is Verdict.OOM
