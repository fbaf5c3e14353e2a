"""The finite space of a study: families of plans, each with its ladder of micro batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from autotune.plan import Plan, Recompute
from autotune.planner import Estimate

SURE_OOM = 0.01
"""A plan with a smaller predicted chance to fit is tried only as the first rung past the edge."""


Space = dict[str, list[int]]
"""Micro batches of each family by its name, in the order of the families."""


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


def make_families(
    candidates: Sequence[Estimate], kept: Space | None = None
) -> tuple[list[Family], list[dict[str, Any]]]:
    """Group ranked candidates into families; the family with the best prediction comes first.

    A family whose very first rung has no chance is left out, others as far as `hopeful` says.

    Args:
        candidates: Legal plans, best first.
        kept: The families of the study that is resumed: predictions may have changed since, its
            space may not.

    Returns:
        The families, and those left out as ``{"plan", "code", "reason"}``.
    """
    groups: dict[str, list[Estimate]] = {}
    for candidate in candidates:
        groups.setdefault(family_name(candidate.plan), []).append(candidate)
    families, left_out = {}, []
    for name, group in groups.items():
        ladder = sorted(group, key=lambda e: e.plan.micro_batch_size)
        if kept is None:
            tried = hopeful(ladder)
        else:
            tried = [e for e in ladder if e.plan.micro_batch_size in kept.get(name, ())]
        if tried:
            families[name] = Family(name=name, ladder=tuple(tried))
        left_out += [predicted_oom(e) for e in ladder if e not in tried]
    order = families if kept is None else [name for name in kept if name in families]
    return [families[name] for name in order], left_out


def hopeful(ladder: Sequence[Estimate]) -> list[Estimate]:
    """Return the rungs a launch should try.

    They end with the first that is predicted not to fit: that one is tried, because the launch is
    paid for and the prediction may be wrong; those above it are not. None where the first is it.
    """
    tried: list[Estimate] = []
    for estimate in ladder:
        if estimate.fit_probability < SURE_OOM:
            return [*tried, estimate] if tried else []
        tried.append(estimate)
    return tried


def space_of(families: Sequence[Family]) -> Space:
    """Return what `make_families` takes to make the same families again."""
    return {f.name: [e.plan.micro_batch_size for e in f.ladder] for f in families}


def family_name(plan: Plan) -> str:
    """Return a plan's name without its micro batch and accumulation."""
    words = [plan.strategy, *plan.split_words]
    if plan.recompute is not Recompute.NONE:
        words.append("recompute")
    return " ".join(words)


def predicted_oom(estimate: Estimate) -> dict[str, Any]:
    """Return the entry of a plan that is not tried."""
    need = estimate.peak.expected_bytes
    return {
        "plan": estimate.plan.to_dict(),
        "code": "PREDICTED_OOM",
        "reason": f"predicted {need / 2**30:.2f} GiB a device: not tried",
    }
