"""Enumerate the legal plans of a workload, estimate each, rank them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autotune.errors import AutotuneError, NothingFitsError
from autotune.memory import (
    MemoryEstimate,
    Verdict,
    estimate_memory,
    estimate_memory_table,
    fit_probability,
    verdict,
)
from autotune.memory.knowledge import model_key
from autotune.memory.peak import Peak
from autotune.memory.residuals import Residual, Residuals, ruler_of
from autotune.memory.verdict import Judged, judge_table
from autotune.plan import Plan, Recompute
from autotune.rules import Violation, check_plan, check_strategy
from autotune.spec.hardware import HardwareSpec, check_precision
from autotune.spec.model import ModelSpec
from autotune.spec.strategy import Replicate, Strategy
from autotune.spec.workload import Workload
from autotune.timing import (
    Calibration,
    TimeEstimate,
    TimeTable,
    estimate_time,
    estimate_time_table,
)
from autotune.units import format_bytes

CP_DEGREES = (1, 2, 4)
_ORDER = {Verdict.FITS: 0, Verdict.AT_RISK: 1, Verdict.OOM: 2}


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What is predicted of one plan."""

    plan: Plan
    peak: Peak
    time: TimeEstimate
    verdict: Verdict
    fit_probability: float
    violations: tuple[Violation, ...] = ()
    breakdown: Callable[[], MemoryEstimate] = field(repr=False, compare=False)
    """Makes `memory`, apart from its residual: most plans of a space are never looked at so."""

    @cached_property
    def memory(self) -> MemoryEstimate:
        """The peak with its components, and the other instants."""
        return replace(self.breakdown(), residual=self.peak.residual)

    def to_dict(self, model: ModelSpec) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "model": model.name,
            "plan": self.plan.to_dict(),
            "world_size": self.plan.world_size,
            "memory": self.memory.to_dict(),
            "time": self.time.to_dict(),
            "verdict": str(self.verdict),
            "fit_probability": self.fit_probability,
            "violations": [
                {"code": v.code, "message": v.message, "hint": v.hint} for v in self.violations
            ],
        }


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


def enumerate_plans(
    model: ModelSpec,
    workload: Workload,
    hardware: HardwareSpec,
    strategies: Sequence[Strategy],
    *,
    micro_batches: Sequence[int] | None = None,
    cp_degrees: Sequence[int] = CP_DEGREES,
    recompute: Sequence[Recompute] = (Recompute.NONE, Recompute.FULL),
    also: Sequence[Plan] = (),
) -> list[Plan]:
    """Return every plan of the space, the illegal layouts once each so that a rule can say why.

    The accumulation follows from the exact global batch. Without `micro_batches` the powers of two
    that divide a rank's sequences are taken, and all of them at once (accumulation 1). The plans
    `also` come in addition, each of one of the strategies.
    """
    del model  # the space does not depend on it; rules and estimates do
    plans = []
    for strategy in strategies:
        for cp in cp_degrees:
            for mode in recompute:
                layout = make_plan(strategy, hardware, cp=cp, recompute=mode)
                plans += _with_batches(layout, workload, micro_batches)
    known = {plan.id for plan in plans} if also else set()
    return plans + [plan for plan in also if plan.id not in known]


def make_plan(
    strategy: Strategy,
    hardware: HardwareSpec,
    *,
    cp: int = 1,
    recompute: Recompute = Recompute.NONE,
    micro_batch_size: int = 1,
    grad_accum_steps: int = 1,
) -> Plan:
    """Lay a strategy out over the hardware; the result may break a rule."""
    data_parallel = max(1, hardware.num_gpus // cp)
    match strategy.replicate:
        case Replicate.ALL:
            dp_replicate, dp_shard = data_parallel, 1
        case Replicate.HYBRID:
            dp_replicate = strategy.copies or max(2, hardware.num_nodes)
            dp_shard = max(1, data_parallel // dp_replicate)
        case Replicate.NONE:
            dp_replicate, dp_shard = 1, data_parallel
    return Plan(
        strategy=strategy.name,
        engine=strategy.engine,
        zero_stage=strategy.zero_stage,
        reshard_after_forward=strategy.reshard_after_forward,
        offload_optimizer=strategy.offload_optimizer,
        offload_params=strategy.offload_params,
        dp_replicate=dp_replicate,
        dp_shard=dp_shard,
        cp=cp,
        micro_batch_size=micro_batch_size,
        grad_accum_steps=grad_accum_steps,
        recompute=recompute,
        bucket_elements=strategy.bucket_elements,
        hpz=strategy.hpz,
    )


def estimate_plan(
    model: ModelSpec,
    workload: Workload,
    plan: Plan,
    hardware: HardwareSpec,
    residuals: Residuals | None = None,
    calibration: Calibration | None = None,
) -> Estimate:
    """Check and estimate one plan; a broken rule is reported in `violations`, not raised.

    Args:
        model: The model.
        workload: What every configuration does alike.
        plan: The configuration.
        hardware: Where it runs.
        residuals: How far real memory lies from the predicted (`memory.knowledge.residuals_for`);
            None takes the committed records alone.
        calibration: What was measured of the hardware's speed; None predicts by formula.

    Raises:
        AutotuneError: the device has no matrix units for the workload's precision.
    """
    check_precision(hardware.gpu, workload.precision)
    violations = check_plan(plan, model, workload, hardware)
    memory = predict_memory(model, workload, plan, hardware, residuals)
    chance = fit_probability(memory, hardware)
    return Estimate(
        plan=plan,
        peak=memory.peak,
        time=estimate_time(model, workload, plan, hardware, calibration),
        verdict=verdict(chance),
        fit_probability=chance,
        violations=tuple(violations),
        breakdown=lambda: memory,
    )


def predict_memory(
    model: ModelSpec,
    workload: Workload,
    plan: Plan,
    hardware: HardwareSpec,
    residuals: Residuals | None = None,
) -> MemoryEstimate:
    """Estimate the memory of one plan, with the residual of its kind; see `estimate_plan`."""
    memory = estimate_memory(model, workload, plan, hardware)
    if residuals is None:
        return memory
    residual = residuals.predict(plan, model_key(model), memory.peak.measurable_bytes)
    return replace(memory, residual=residual)


def judged(estimate: Estimate, hardware: HardwareSpec, residual: Residual) -> Estimate:
    """Return an estimate under another residual."""
    peak = replace(estimate.peak, residual=residual)
    chance = fit_probability(peak, hardware)
    return replace(estimate, peak=peak, fit_probability=chance, verdict=verdict(chance))


def rank_plans(
    model: ModelSpec,
    workload: Workload,
    hardware: HardwareSpec,
    strategies: Sequence[Strategy],
    *,
    micro_batches: Sequence[int] | None = None,
    cp_degrees: Sequence[int] = CP_DEGREES,
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
    candidates = _estimate_plans(model, workload, legal, hardware, residuals, calibration)
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


def _estimate_plans(
    model: ModelSpec,
    workload: Workload,
    plans: Sequence[Plan],
    hardware: HardwareSpec,
    residuals: Residuals | None,
    calibration: Calibration | None = None,
) -> list[Estimate]:
    """Estimate legal plans: their memory all at once, its components only where asked for."""
    if not plans:
        return []
    check_precision(hardware.gpu, workload.precision)
    residuals = residuals or Residuals.known(ruler_of(on_cpu=hardware.gpu.is_cpu))
    table = estimate_memory_table(model, workload, plans, hardware)
    times = estimate_time_table(model, workload, table.columns, hardware, calibration)
    found = judge_table(table, hardware, residuals, model_key(model))
    return [
        Estimate(
            plan=plan,
            peak=found.peak(position),
            time=times.estimate(position),
            verdict=verdict(float(found.fit_probability[position])),
            fit_probability=float(found.fit_probability[position]),
            breakdown=partial(estimate_memory, model, workload, plan, hardware),
        )
        for position, plan in enumerate(plans)
    ]


def refusal_lines(refused: Iterable[tuple[str, str]]) -> list[str]:
    """Return a line for each code of ``(code, reason)``: how many have it, and the first reason."""
    reasons: dict[str, list[str]] = {}
    for code, reason in refused:
        reasons.setdefault(code, []).append(reason)
    return [f"{code} x {len(given)}: {given[0]}" for code, given in sorted(reasons.items())]


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


def _with_batches(
    layout: Plan, workload: Workload, micro_batches: Sequence[int] | None
) -> list[Plan]:
    per_rank, rest = divmod(workload.global_batch_size, layout.data_parallel_size)
    if rest or not per_rank:
        return [layout]  # the rule on the global batch refuses it
    if micro_batches is None:
        sizes = [2**power for power in range(per_rank.bit_length()) if per_rank % 2**power == 0]
        sizes += [per_rank] if per_rank not in sizes else []
    else:
        sizes = list(micro_batches)
    # A given size that does not divide is kept, so that the rule refuses it by name.
    return [_batch(layout, size, 1 if per_rank % size else per_rank // size) for size in sizes]


def _batch(layout: Plan, micro_batch_size: int, grad_accum_steps: int) -> Plan:
    return replace(layout, micro_batch_size=micro_batch_size, grad_accum_steps=grad_accum_steps)


def nothing_fits(model: ModelSpec, hardware: HardwareSpec, candidates: Sequence[Estimate]) -> str:
    """Say what comes closest, by how much it misses, and what to do."""
    closest = closest_to_fitting(candidates)
    misses = []
    need, have = closest.peak.expected_bytes, hardware.gpu.memory_bytes
    if need > have:
        misses.append(
            f"needs {format_bytes(need)} of {format_bytes(have)} on each device, "
            f"{format_bytes(need - have)} too much"
        )
    host, host_have = (
        closest.peak.node_host_bytes(hardware.gpus_per_node),
        hardware.host_memory_bytes,
    )
    if host > host_have:
        misses.append(
            f"needs {format_bytes(host)} of {format_bytes(host_have)} host memory for a node's "
            f"GPUs, "
            f"{format_bytes(host - host_have)} too much"
        )
    return (
        f"{model.name} fits {hardware.describe()} under no strategy. Closest: "
        f"{closest.plan.describe()}, which {' and '.join(misses)}. Use more GPUs or larger ones, "
        "a shorter --seq-len, or --adapter lora."
    )
