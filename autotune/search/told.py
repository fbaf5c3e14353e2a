"""How a record is told to Optuna: its state, its value, its constraint, its attributes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from optuna.trial import TrialState

from autotune.search.policy import Charge
from autotune.trial.protocol import Outcome
from autotune.trial.record import TrialRecord

MEMORY = "memory"
PLAN_ID, OUTCOME, LAUNCH = "plan_id", "outcome", "launch"
SPREAD = "relative_sd"
"""Standard error of the median step over it, from the steps inside the launch."""
STEP_S = "step_s"
"""Of an optimizer step, which is what is predicted: the value counts the valid tokens alone."""
CHARGED_S, OPENED = "charged_s", "opened_launch"
"""What it cost, and whether the start of its launch is part of that."""

_CONSTRAINED = {Outcome.OOM, Outcome.HOST_OOM, Outcome.THRASH}
"""Outcomes told as a broken constraint. Told as FAIL, samplers would ignore them and return."""
_ASSUMED_STEP_SD, _ASSUMED_STEPS = 0.05, 3
"""Relative standard deviation of a step before any, and how many steps that counts for."""


def state_of(record: TrialRecord) -> TrialState:
    """Return COMPLETE for what ran or did not fit, FAIL for what says nothing of its plan."""
    if record.outcome is Outcome.OK or record.outcome in _CONSTRAINED:
        return TrialState.COMPLETE
    return TrialState.FAIL


def value_of(record: TrialRecord) -> float:
    """Return the objective: valid tokens/s; 0 for what does not fit, beside its constraint."""
    return record.tokens_per_s or 0.0


def constraint_of(record: TrialRecord) -> float:
    """Return 1 where memory was not enough, -1 where it was (Optuna: above 0 is infeasible)."""
    return 1.0 if record.outcome in _CONSTRAINED else -1.0


def attributes_of(record: TrialRecord, charge: Charge | None) -> dict[str, Any]:
    """Return what a told trial carries besides; a charge is not known of an earlier search's."""
    found: dict[str, Any] = {
        PLAN_ID: record.plan_id, OUTCOME: str(record.outcome), LAUNCH: record.launch,
    }  # fmt: skip
    if len(record.step_times_s) > 1:
        found[SPREAD] = relative_sd(record.step_times_s)
    if record.step_s is not None:
        found[STEP_S] = record.step_s
    if charge is not None:
        found |= {CHARGED_S: charge.seconds, OPENED: charge.opened}
    return found


def relative_sd(step_times_s: Sequence[float]) -> float:
    """Return the relative standard error of the median of few steps.

    Two or three steps that happen to agree are not exact, so an assumed spread counts as well.
    """
    num = len(step_times_s)
    median = statistics.median(step_times_s)
    own = statistics.variance(step_times_s) / median**2 * (num - 1)
    pooled = (own + _ASSUMED_STEP_SD**2 * _ASSUMED_STEPS) / (num - 1 + _ASSUMED_STEPS)
    return math.sqrt(math.pi / 2 * pooled / num)
