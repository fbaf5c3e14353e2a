"""When a rung has seen enough steps, and what it never does to get there faster."""

from __future__ import annotations

import random

import pytest

from autotune.trial.outcome import median_interval
from autotune.trial.protocol import Measurement
from autotune.trial.steps import enough, optimistic_s, relative_half_width, warmup_left

LIMITS = Measurement(min_steps=3, max_steps=20, target_seconds=60.0)


def steps_taken(times: list[float], **options: float) -> int:
    """Feed one step after another; return how many it took."""
    for count in range(1, len(times) + 1):
        if enough(times[:count], LIMITS, **options) is not None:
            return count
    raise AssertionError("never enough")


def test_steady_steps_end_at_the_least_number():
    assert steps_taken([1.0, 1.001, 0.999, 1.0]) == 3


def test_noise_goes_on_until_the_interval_is_tight_or_the_cap_is_reached():
    draw = random.Random(1)
    little = [1.0 + draw.gauss(0, 0.015) for _ in range(20)]
    much = [1.0 + draw.gauss(0, 0.2) for _ in range(20)]
    taken = steps_taken(little)
    assert 3 < taken < 20
    half = median_interval(little[:taken]).high - median_interval(little[:taken]).median
    assert half <= 0.02 * median_interval(little[:taken]).median
    assert steps_taken(much) == 20


def test_the_time_cap_ends_it_but_never_before_the_least_number():
    slow = [30.0, 45.0, 30.0, 50.0]
    assert enough(slow[:2], LIMITS) is None
    assert enough(slow[:3], LIMITS) is not None


def test_one_outlier_does_not_keep_it_going():
    calm = [1.0, 1.002, 0.998, 1.001, 0.999, 1.0, 1.001]
    with_outlier = [1.0, 1.002, 3.0, 0.998, 1.001, 0.999, 1.0]
    assert steps_taken(with_outlier) == 5, "as soon as it is one in five"
    assert relative_half_width(with_outlier) == pytest.approx(
        relative_half_width([step for step in with_outlier if step < 2])
    )
    assert relative_half_width(calm) < 0.02


def test_many_slow_steps_are_no_outliers():
    two_speeds = [1.0, 1.0, 1.0, 1.0, 1.5, 1.5]
    assert relative_half_width(two_speeds) > 0.02


@pytest.mark.parametrize(
    ("steps", "dropped"),
    [
        ([1.5, 1.3, 1.1, 1.0, 1.01, 1.0], 3),
        ([2.0, 1.9, 1.8, 1.5, 1.4, 1.3, 1.0, 1.0, 1.0, 1.01, 1.0, 1.0], 6),
        ([1.0, 1.01, 1.0, 1.0, 1.01, 1.0], 0),
        ([1.015, 1.014, 1.013, 1.0, 1.001, 1.002], 0),  # falls by less than the target
        ([1.0, 1.0, 1.0, 1.2, 1.2, 1.2], 0),  # gets slower: that is how it runs
        ([2.0, 1.0, 1.0, 1.0, 1.0], 0),  # too few to leave three twice
    ],
)
def test_warm_up_that_still_falls_is_dropped(steps: list[float], dropped: int):
    assert warmup_left(steps, LIMITS) == dropped


def test_what_is_dropped_is_told():
    done = enough([1.5, 1.3, 1.1, 1.0, 1.001, 1.0], LIMITS)
    assert done is not None and (done.dropped, done.cut_short) == (3, False)


def test_a_hopeless_rung_is_cut_once_even_its_optimistic_bound_is_too_slow():
    times = [2.0, 2.01, 2.0, 2.0]
    assert enough(times[:1], LIMITS, give_up_step_s=1.0) is None, "one step has no interval"
    done = enough(times[:2], LIMITS, give_up_step_s=1.0)
    assert done is not None and done.cut_short
    assert optimistic_s(times[:2]) < 2.0, "the interval of two steps is wide"
    hopeful = enough(times[:2], LIMITS, give_up_step_s=1.95)
    assert hopeful is None


def test_steps_that_still_get_faster_are_not_called_hopeless():
    assert enough([2.0, 1.2], LIMITS, give_up_step_s=1.0) is None


def test_the_lacking_micro_steps_count_for_the_bound():
    times = [1.0, 1.0]
    assert enough(times, LIMITS, give_up_step_s=1.5) is None
    done = enough(times, LIMITS, give_up_step_s=1.5, missing_s=0.6)
    assert done is not None and done.cut_short
