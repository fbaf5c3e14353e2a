"""When a rung has seen enough steps: the rule every rank follows on the same numbers.

A step's time here is the slowest rank's, so that all ranks decide alike. A rung ends

- once half the 95% interval of its median step is at most `target_relative_interval` of it, where
  the interval leaves out single outliers: they say nothing about the median, and one of them would
  keep a rung going to its cap;
- at `max_steps` steps, or after `target_seconds`, though not before `min_steps`;
- once it is hopeless: its optimistic bound is slower than what the search can still use.

Steps that get faster all along are warm-up that has not ended: the first half is left out when
every one of its steps is slower than every one of the second half, by more than the target.
The interval is looked at after each step, so it is a rule to stop by, a little narrower than 95%.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from autotune.trial.outcome import median_interval
from autotune.trial.protocol import Measurement

_OUTLIER_DEVIATIONS = 5.0
"""So many robust standard deviations above the median are no noise."""
_MAD_TO_DEVIATION = 1.4826
_OUTLIER_SHARE = 0.2
"""No more of the steps than this are outliers: else they are how it runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Enough:
    """Why a rung's steps are enough."""

    dropped: int
    """So many of the first are warm-up."""
    cut_short: bool = False
    """The rung was given up as too slow."""


def enough(
    step_s: Sequence[float],
    measurement: Measurement,
    *,
    give_up_step_s: float | None = None,
    missing_s: float = 0.0,
) -> Enough | None:
    """Decide whether the steps so far are enough; None to go on.

    Args:
        step_s: seconds of each step after the fixed warm-up, slowest rank.
        measurement: the limits.
        give_up_step_s: a step of the plan that is surely longer than this is of no use.
        missing_s: at least so much longer is the plan's step, whose accumulation is larger.
    """
    if give_up_step_s is not None and optimistic_s(step_s) + missing_s > give_up_step_s:
        return Enough(dropped=0, cut_short=True)
    dropped = warmup_left(step_s, measurement)
    counted = step_s[dropped:]
    if len(counted) < measurement.min_steps:
        return None
    tight = relative_half_width(counted) <= measurement.target_relative_interval
    over = len(step_s) >= measurement.max_steps or sum(step_s) >= measurement.target_seconds
    return Enough(dropped=dropped) if tight or over else None


def optimistic_s(step_s: Sequence[float]) -> float:
    """Return what the median step is at least: below every step seen and below its interval.

    Zero for a single step, whose interval is infinitely wide.
    """
    if len(step_s) < 2:
        return 0.0
    return min(*step_s, median_interval(step_s).low)


def relative_half_width(step_s: Sequence[float]) -> float:
    """Return half the 95% interval of the median over the median, single outliers left out."""
    kept = _without_outliers(step_s)
    spread = median_interval(kept)
    return (spread.high - spread.median) / spread.median


def warmup_left(step_s: Sequence[float], measurement: Measurement) -> int:
    """Return how many of the first steps are warm-up still; `min_steps` are left in any case."""
    dropped = 0
    while len(step_s) - dropped >= 2 * measurement.min_steps:
        rest = step_s[dropped:]
        half = len(rest) // 2
        first, second = rest[:half], rest[half:]
        slower = statistics.median(first) / statistics.median(second) - 1
        if min(first) <= max(second) or slower <= measurement.target_relative_interval:
            break
        dropped += half
    return dropped


def _without_outliers(step_s: Sequence[float]) -> list[float]:
    median = statistics.median(step_s)
    deviation = _MAD_TO_DEVIATION * statistics.median(abs(step - median) for step in step_s)
    kept = [step for step in step_s if step <= median + _OUTLIER_DEVIATIONS * deviation]
    few = len(step_s) - len(kept) <= _OUTLIER_SHARE * len(step_s)
    return kept if few else list(step_s)
