"""All plans of a space, estimated and in order."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from autotune.errors import AutotuneError, NothingFitsError
from autotune.memory import Verdict
from autotune.memory.residuals import Residuals
from autotune.plan import CpBackend, Plan, Recompute
from autotune.planner.estimate import Estimate, estimate_plans
from autotune.planner.layouts import CP_DEGREES, enumerate_plans
from autotune.planner.order import best_first
from autotune.planner.refusals import nothing_fits
from autotune.rules import check_plan, check_strategy
from autotune.spec.hardware import HardwareSpec
from autotune.spec.model import ModelSpec
from autotune.spec.strategy import Strategy
from autotune.spec.workload import Workload
from autotune.timing import Calibration


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejected:
    """A plan a rule refuses."""

    plan: Plan
    code: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranking:
    """All plans of a space."""

    candidates: tuple[Estimate, ...]
    """Legal plans, best first: those that fit by speed, then those at risk, then predicted OOMs."""
    rejected: tuple[Rejected, ...]
    space_size: int
    elapsed_s: float


def rank_plans(
    model: ModelSpec,
    workload: Workload,
    hardware: HardwareSpec,
    strategies: Sequence[Strategy],
    *,
    micro_batches: Sequence[int] | None = None,
    cp_degrees: Sequence[int] = CP_DEGREES,
    cp_backends: Sequence[CpBackend] | None = None,
    tp_degrees: Sequence[int] = (1,),
    recompute: Sequence[Recompute] = (Recompute.NONE, Recompute.FULL),
    also: Sequence[Plan] = (),
    residuals: Residuals | None = None,
    calibration: Calibration | None = None,
) -> Ranking:
    """Estimate the whole space and order it.

    Raises:
        AutotuneError: every plan breaks a rule.
        NothingFitsError: no legal plan has a chance to fit.
    """
    ranking = estimate_space(
        model,
        workload,
        hardware,
        strategies,
        micro_batches=micro_batches,
        cp_degrees=cp_degrees,
        cp_backends=cp_backends,
        tp_degrees=tp_degrees,
        recompute=recompute,
        also=also,
        residuals=residuals,
        calibration=calibration,
    )
    if ranking.candidates[0].verdict is Verdict.OOM:
        raise NothingFitsError(nothing_fits(model, hardware, ranking.candidates))
    return ranking


def estimate_space(
    model: ModelSpec,
    workload: Workload,
    hardware: HardwareSpec,
    strategies: Sequence[Strategy],
    *,
    micro_batches: Sequence[int] | None = None,
    cp_degrees: Sequence[int] = CP_DEGREES,
    cp_backends: Sequence[CpBackend] | None = None,
    tp_degrees: Sequence[int] = (1,),
    recompute: Sequence[Recompute] = (Recompute.NONE, Recompute.FULL),
    also: Sequence[Plan] = (),
    residuals: Residuals | None = None,
    calibration: Calibration | None = None,
) -> Ranking:
    """Estimate the whole space and order it, also when nothing fits.

    Raises:
        AutotuneError: every plan breaks a rule.
    """
    started = time.perf_counter()
    plans = enumerate_plans(
        model,
        workload,
        hardware,
        strategies,
        micro_batches=micro_batches,
        cp_degrees=cp_degrees,
        cp_backends=cp_backends,
        tp_degrees=tp_degrees,
        recompute=recompute,
        also=also,
    )
    by_name = {strategy.name: strategy for strategy in strategies}
    rejected, legal = [], []
    for plan in plans:
        broken = check_plan(plan, model, workload, hardware)
        broken += check_strategy(by_name[plan.strategy], workload, plan.cp)
        if broken:
            reason = f"{broken[0].message} {broken[0].hint}"
            rejected.append(Rejected(plan=plan, code=broken[0].code, reason=reason))
        else:
            legal.append(plan)
    candidates = estimate_plans(model, workload, legal, hardware, residuals, calibration)
    if not candidates:
        reasons = {r.code: r.reason for r in reversed(rejected)}
        common = Counter(r.code for r in rejected).most_common(2)
        listed = " ".join(f"[{code}] {reasons[code]}" for code, _ in common)
        raise AutotuneError(
            f"No legal configuration of {model.name} on {hardware.describe()}: {listed}"
        )
    return Ranking(
        candidates=tuple(best_first(candidates)),
        rejected=tuple(rejected),
        space_size=len(plans),
        elapsed_s=time.perf_counter() - started,
    )
