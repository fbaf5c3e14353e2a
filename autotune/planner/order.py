"""Which of several plans is the better one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autotune.memory import Verdict, verdict
from autotune.memory.verdict import Judged
from autotune.planner.estimate import Estimate
from autotune.timing import TimeTable

_ORDER = {Verdict.FITS: 0, Verdict.AT_RISK: 1, Verdict.OOM: 2}


def best_first(candidates: Sequence[Estimate]) -> list[Estimate]:
    """Order plans: those that fit by speed, then those at risk, then predicted OOMs."""
    return sorted(candidates, key=lambda e: (_ORDER[e.verdict], -e.time.tokens_per_s, e.plan.id))


def best_first_index(judged: Judged, times: TimeTable) -> NDArray[np.int64]:
    """Return the order of `best_first` for plans as arrays; equal ones keep theirs."""
    group = np.array([_ORDER[verdict(chance)] for chance in judged.fit_probability.tolist()])
    return np.lexsort((times.step_s, group))


def closest_to_fitting(candidates: Sequence[Estimate]) -> Estimate:
    """Return the plan that misses by least: of chances that are none, the one of fewest bytes."""
    return max(
        candidates,
        key=lambda e: (round(e.fit_probability, 3), -e.peak.expected_bytes, e.time.tokens_per_s),
    )
