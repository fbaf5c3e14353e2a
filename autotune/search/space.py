"""The finite space of a study: families of plans, each with its ladder of micro batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from autotune.plan import Plan, Recompute
from autotune.planner import Estimate

SURE_OOM = 0.01
"""A plan with a smaller predicted chance to fit is tried only as the first rung past the edge."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Plans that differ only in micro batch and accumulation: what one launch can measure."""

    name: str
    """Unique in the study, and readable: ``zero2 cp=2 recompute``."""
    ladder: tuple[Estimate, ...]
    """Ascending micro batch."""

    @property
    def best_predicted(self) -> Estimate:
        """The rung expected to be the fastest of those that have a chance to fit."""
        return max(self.ladder, key=lambda e: (e.fit_probability >= SURE_OOM, e.time.tokens_per_s))

    def rung(self, micro_batch_size: int) -> Estimate:
        """Return the estimate at a micro batch."""
        return next(e for e in self.ladder if e.plan.micro_batch_size == micro_batch_size)


def make_families(candidates: Sequence[Estimate]) -> tuple[list[Family], list[dict[str, Any]]]:
    """Group ranked candidates into families; the family with the best prediction comes first.

    A ladder ends with the first rung that is predicted not to fit: that one is tried, because the
    launch is paid for and the prediction may be wrong; those above it are not. A family whose very
    first rung has no chance is left out.

    Returns:
        The families, and those left out as ``{"plan", "code", "reason"}``.
    """
    groups: dict[str, list[Estimate]] = {}
    for candidate in candidates:
        groups.setdefault(candidate.plan.family_id, []).append(candidate)
    families, left_out = [], []
    for group in groups.values():
        ladder = sorted(group, key=lambda e: e.plan.micro_batch_size)
        hopeless = [e.fit_probability < SURE_OOM for e in ladder]
        if hopeless[0]:
            left_out += [_predicted_oom(e) for e in ladder]
            continue
        end = hopeless.index(True) + 1 if True in hopeless else len(ladder)
        families.append(Family(name=family_name(ladder[0].plan), ladder=tuple(ladder[:end])))
        left_out += [_predicted_oom(e) for e in ladder[end:]]
    return families, left_out


def family_name(plan: Plan) -> str:
    """Return a plan's name without its micro batch and accumulation."""
    words = [plan.strategy]
    if plan.cp > 1:
        words.append(f"cp={plan.cp}")
    if plan.recompute is not Recompute.NONE:
        words.append("recompute")
    return " ".join(words)


def _predicted_oom(estimate: Estimate) -> dict[str, Any]:
    need = estimate.memory.total_bytes
    return {
        "plan": estimate.plan.to_dict(),
        "code": "PREDICTED_OOM",
        "reason": f"predicted {need / 2**30:.2f} GiB a device: not tried",
    }
