"""What each part of a step takes, on a clock that only the test moves; and whose peak it is."""

from __future__ import annotations

import pytest

from autotune.runner.gauges import CpuGauge
from autotune.runner.timers import StepTimer
from autotune.units import MIB

pytestmark = pytest.mark.integration


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def now_s(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def timer(clock: Clock) -> StepTimer:
    timer = StepTimer(clock)  # type: ignore[arg-type]
    timer.begin()
    return timer


def test_a_step_lasts_from_end_to_end_and_its_parts_are_told_apart(
    clock: Clock, timer: StepTimer
) -> None:
    for start in (0.5, 8.0):  # reading the batches
        clock.now += start
        with timer.micro_step(sync=False):
            clock.now += 2
        clock.now += 0.25
        with timer.micro_step(sync=True):
            clock.now += 3
        clock.now += 1  # clipping, optimizer, zeroing
        times = timer.end_step()
        assert (times.micro, times.sync_micro, times.optimizer) == ([2.0], 3.0, 1.0)
        assert times.whole == start + 2 + 0.25 + 3 + 1


def test_an_optimizer_inside_the_last_micro_step_is_taken_off_it(
    clock: Clock, timer: StepTimer
) -> None:
    for _ in range(2):
        with timer.micro_step(sync=False):
            clock.now += 2
        with timer.micro_step(sync=True):
            clock.now += 3
            with timer.optimizer_step():
                clock.now += 5
        clock.now += 0.5  # what comes after is not the optimizer's
        times = timer.end_step()
        assert (times.micro, times.sync_micro, times.optimizer) == ([2.0], 3.0, 5.0)
        assert times.whole == 10.5


def test_begin_leaves_out_what_lies_between_rungs(clock: Clock, timer: StepTimer) -> None:
    with timer.micro_step(sync=False):
        clock.now += 2
    clock.now += 100
    timer.begin()
    with timer.micro_step(sync=True):
        clock.now += 3
    times = timer.end_step()
    assert (times.micro, times.sync_micro, times.whole) == ([], 3.0, 3.0)


def test_a_reset_forgets_the_peak_before_it() -> None:
    gauge, size = CpuGauge(), 256 * MIB
    gauge.set_baseline()
    gauge.reset()
    block = bytearray(size)
    block[::4096] = b"1" * len(block[::4096])
    del block
    assert gauge.read().allocated_bytes > 0.9 * size
    gauge.reset()
    assert gauge.read().allocated_bytes < size / 2
