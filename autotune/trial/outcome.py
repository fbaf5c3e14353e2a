"""From what the ranks wrote to one `TrialRecord` per configuration."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from autotune.plan import Plan
from autotune.trial.protocol import (
    AccumulationResult,
    Outcome,
    RankResult,
    Request,
    Rung,
    RungResult,
)
from autotune.trial.record import TrialRecord

THRASH_RETRIES = 1
"""More allocator retries than this in a rung's counted steps: it thrashes (Composer's gate)."""
_NEAR_TOTAL = 0.98
"""A device filled further leaves a longer batch no room: it counts as thrashing."""

_MEMORY = {Outcome.OOM, Outcome.HOST_OOM}

# Two-sided 95% quantiles of Student's t by degrees of freedom (any table); above 10, the normal's.
_T95 = (math.inf, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
_MEDIAN_ERROR = math.sqrt(math.pi / 2)
"""Standard error of a median over that of a mean, for normal noise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """A median and its 95% confidence interval."""

    median: float
    low: float
    high: float


def median_interval(values: Sequence[float]) -> Spread:
    """Return the median with a t-interval; infinitely wide for a single value."""
    median = statistics.median(values)
    if len(values) < 2:
        return Spread(median=median, low=0.0, high=math.inf)
    error = _MEDIAN_ERROR * statistics.stdev(values) / math.sqrt(len(values))
    half = t_quantile_95(len(values) - 1) * error
    return Spread(median=median, low=max(0.0, median - half), high=median + half)


def t_quantile_95(freedom: int) -> float:
    """Return the two-sided 95% quantile of Student's t."""
    return _T95[freedom] if freedom < len(_T95) else 1.96


def read_rungs(
    request: Request, results: Sequence[RankResult], outcome: Outcome, message: str
) -> list[TrialRecord]:
    """Return a record for each rung that was reached, failures included.

    A rung counts as measured when every rank finished it. The first one that did not carries the
    launch's outcome; rungs above it are left out: nobody tried them.

    Args:
        request: what was asked.
        results: what each rank wrote, by rank.
        outcome: how the launch ended.
        message: why.
    """
    records = []
    # What failed after a rehearsal's steps failed in what a full run does, too.
    failed = request.rehearses and outcome is not Outcome.OK
    for rung in request.rungs:
        record = read_rung(
            request.plan_object(), rung, results, outcome, message, finished=not failed
        )
        records.append(_rehearsed(record, results))
        if records[-1].outcome not in (Outcome.OK, Outcome.THRASH):
            break
    return records


def read_rung(
    plan: Plan,
    rung: Rung,
    results: Sequence[RankResult],
    outcome: Outcome,
    message: str,
    *,
    finished: bool = True,
) -> TrialRecord:
    """Return a rung's record: measured when every rank finished it, else as the launch ended.

    Args:
        plan: the launch's; micro batch and accumulation are the rung's.
        rung: which one.
        results: what each rank wrote, by rank.
        outcome: how the launch ended; of no account where the rung was finished.
        message: why.
        finished: whether finished steps are enough.
    """
    rung_plan = replace(
        plan, micro_batch_size=rung.micro_batch_size, grad_accum_steps=rung.grad_accum_steps
    )
    found = [_rung_of(result, rung.micro_batch_size) for result in results]
    answers = [answer for answer in found if answer is not None]
    finished = finished and bool(results) and len(answers) == len(results)
    if finished and all(answer.outcome is Outcome.OK for answer in answers):
        record = _measured(rung_plan, answers)
    else:
        record = _failed(rung_plan, answers, outcome, message)
    ready = [result.ready_s for result in results if result.ready_s is not None]
    return replace(
        record,
        launch_ready_s=max(ready, default=None),
        launch_mode=results[0].start if ready else "",
    )


def _rehearsed(record: TrialRecord, results: Sequence[RankResult]) -> TrialRecord:
    """Add what the ranks did after the steps; of other launches, nothing."""
    done = [result.rehearsal for result in results if result.rehearsal is not None]
    if not done or len(done) < len(results) or record.step_s is None:
        return record
    allocated = [record.peak_allocated_bytes or 0, *(one.peak_allocated_bytes for one in done)]
    reserved = [record.peak_reserved_bytes or 0, *(one.peak_reserved_bytes for one in done)]
    return replace(
        record,
        evaluation_s=max(one.evaluation_s for one in done),
        save_s=max(one.save_s for one in done),
        peak_allocated_bytes=max(allocated),
        peak_reserved_bytes=max(reserved),
    )


def _rung_of(result: RankResult, micro_batch_size: int) -> RungResult | None:
    return next((r for r in result.rungs if r.micro_batch_size == micro_batch_size), None)


def _failed(plan: Plan, answers: list[RungResult], outcome: Outcome, message: str) -> TrialRecord:
    named = next((a for a in answers if a.outcome is not Outcome.OK), None)
    # A rank names the memory that ran out more exactly than the launch as a whole does.
    same = named is not None and (outcome is named.outcome or {outcome, named.outcome} <= _MEMORY)
    peaks = [part for answer in answers for part in answer.accumulations]
    return TrialRecord(
        launch=0,
        plan_id=plan.id,
        plan=plan.to_dict(),
        outcome=named.outcome if named and same else outcome,
        message=named.message if named and same else message,
        peak_allocated_bytes=_largest(part.peak_allocated_bytes for part in peaks),
        peak_reserved_bytes=_largest(part.peak_reserved_bytes for part in peaks),
        measured_accum_steps=tuple(sorted({part.grad_accum_steps for part in peaks})),
    )


def _largest(values: Iterable[int]) -> int | None:
    return max(values, default=None)


def _measured(plan: Plan, answers: list[RungResult]) -> TrialRecord:
    parts = [part for answer in answers for part in answer.accumulations]
    by_accumulation: dict[int, list[AccumulationResult]] = {}
    for part in parts:
        by_accumulation.setdefault(part.grad_accum_steps, []).append(part)
    base = by_accumulation.get(plan.grad_accum_steps) or by_accumulation[max(by_accumulation)]
    steps = _slowest([part.step_s for part in base])
    wrong = [s for part in base for s in part.step_s if not (math.isfinite(s) and s > 0)]
    if wrong:
        said = f"a step took {wrong[0]} s: no clock says so"
        return _failed(plan, answers, Outcome.INVALID, said)
    spread = median_interval(steps)
    base_accum = base[0].grad_accum_steps
    micro = _median_of_slowest([part.micro_step_s for part in base])
    if base_accum != plan.grad_accum_steps:
        spread = _composed(spread, base, plan.grad_accum_steps)
    # Every rung reads other sequences, and few: their own tokens would rank the draw, not the plan.
    step_tokens = base[0].mean_step_tokens / base_accum * plan.grad_accum_steps
    read_tokens = statistics.mean(base[0].valid_tokens) / base_accum * plan.grad_accum_steps
    retries = max(part.alloc_retries for part in base)
    thrashes = _thrashing(base)
    return TrialRecord(
        launch=0,
        plan_id=plan.id,
        plan=plan.to_dict(),
        outcome=Outcome.THRASH if thrashes else Outcome.OK,
        message=thrashes or "",
        tokens_per_s=step_tokens / spread.median,
        step_tokens=step_tokens,
        step_tokens_read=read_tokens,
        step_s=spread.median,
        step_s_low=spread.low,
        step_s_high=None if math.isinf(spread.high) else spread.high,
        micro_step_s=micro,
        sync_micro_step_s=_median_of_slowest([part.sync_micro_step_s for part in base]),
        optimizer_step_s=_median_of_slowest([part.optimizer_step_s for part in base]),
        measured_accum_steps=tuple(sorted(by_accumulation)),
        peak_allocated_bytes=_largest(part.peak_allocated_bytes for part in base),
        peak_reserved_bytes=_largest(part.peak_reserved_bytes for part in base),
        alloc_retries=retries,
        step_times_s=tuple(steps),
        cut_short=any(answer.cut_short for answer in answers),
        warmup_times_s=tuple(base[0].warmup_s),
        rung_wall_s=max(answer.wall_s for answer in answers) or None,
    )


def _thrashing(parts: Sequence[AccumulationResult]) -> str | None:
    """Say why a rung that ran is too near the limit of memory, if so."""
    retries = max(part.alloc_retries for part in parts)
    if retries > THRASH_RETRIES:
        return f"{retries} allocator retries: too near the memory limit"
    for part in parts:
        used, total = part.device_used_bytes, part.device_total_bytes
        if used is not None and total and used > _NEAR_TOTAL * total:
            return f"{used / total:.1%} of the device's memory taken: too near its limit"
    return None


def _composed(spread: Spread, base: list[AccumulationResult], grad_accum_steps: int) -> Spread:
    """Lengthen the measured step by the micro-steps it lacks.

    The added micro-step is the measured one without synchronisation, plus its share of the step's
    time outside the timed parts (data, bookkeeping). Its interval adds, as for correlated errors.
    """
    measured = base[0].grad_accum_steps
    missing = grad_accum_steps - measured
    micro_steps = _slowest([part.micro_step_s for part in base])
    micro = median_interval(micro_steps)
    parts = base[0]
    timed = sum(parts.micro_step_s) + sum(parts.sync_micro_step_s) + sum(parts.optimizer_step_s)
    outside = max(0.0, sum(parts.step_s) - timed) / (len(parts.step_s) * measured)
    return Spread(
        median=spread.median + missing * (micro.median + outside),
        low=spread.low + missing * (micro.low + outside),
        high=spread.high + missing * (micro.high + outside),
    )


def _slowest(series: list[list[float]]) -> list[float]:
    """Return, step by step, the slowest rank's time: the others wait for it."""
    return [max(step) for step in zip(*series, strict=True)]


def _median_of_slowest(series: list[list[float]]) -> float | None:
    values = _slowest(series)
    return statistics.median(values) if values else None
