"""What was predicted against what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from autotune.report import words
from autotune.report.answer import standings
from autotune.report.charts.figure import (
    Chart,
    by_strategy,
    identity_line,
    layout,
    memory_unit,
    thinned,
)
from autotune.report.study import Study
from autotune.trial.protocol import Outcome
from autotune.trial.record import TrialRecord

_LOG_FROM_RATIO = 20.0


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictionError:
    """How far the predictions were from what was measured, as fractions of the measured value."""

    count: int
    median: float
    worst: float


def prediction_error(pairs: Iterable[tuple[float, float]]) -> PredictionError | None:
    """Return the relative errors of ``(predicted, measured)`` pairs; None without any."""
    errors = [abs(predicted - measured) / measured for predicted, measured in pairs if measured > 0]
    if not errors:
        return None
    return PredictionError(count=len(errors), median=statistics.median(errors), worst=max(errors))


def memory_prediction_chart(study: Study) -> Chart | None:
    """Peak memory, predicted against the allocator's measured peak."""
    ran = [
        r
        for r in standings(study.records)
        if r.predicted_bytes is not None and r.peak_allocated_bytes is not None
    ]
    error = prediction_error((r.predicted_bytes or 0, r.peak_allocated_bytes or 0) for r in ran)
    if error is None:
        return None
    unit, unit_name = memory_unit(r.peak_allocated_bytes or 0 for r in ran)
    drawn, thinning = thinned(ran)
    reserved = [r for r in drawn if r.peak_reserved_bytes is not None]

    def predicted(record: TrialRecord) -> float:
        return (record.predicted_bytes or 0) / unit

    def allocated(record: TrialRecord) -> float:
        return (record.peak_allocated_bytes or 0) / unit

    traces = [
        identity_line([*map(predicted, ran), *map(allocated, ran)]),
        *by_strategy(study, drawn, predicted, allocated),
        {
            "type": "scatter",
            "mode": "markers",
            "name": "reserved",
            "visible": "legendonly",
            "x": [predicted(r) for r in reserved],
            "y": [(r.peak_reserved_bytes or 0) / unit for r in reserved],
            "marker": {"symbol": "line-ew-open", "size": 9, "color": "@muted"},
            "hoverinfo": "y+name",
        },
    ]
    on_cpu = study.section("hardware").get("device") == "cpu"
    ruler = "growth of the process's resident set" if on_cpu else "the allocator's peak"
    return Chart(
        key="memory",
        title="Memory: predicted against measured",
        summary=f"{_error_words(error)} Measured is {ruler}, the largest over the ranks. "
        f"{_interval_words(ran)}{_misses_words(study.records)}{thinning}",
        figure={
            "data": traces,
            "layout": layout(f"predicted ({unit_name})", f"measured ({unit_name})"),
        },
    )


def speed_prediction_chart(study: Study) -> Chart | None:
    """Seconds of a step, predicted against measured.

    Not tokens a second: measured ones count tokens with a label, predicted ones all of them.
    """
    ran = [r for r in standings(study.records) if _predicted_step_s(study, r) and r.step_s]

    def predicted(record: TrialRecord) -> float:
        return _predicted_step_s(study, record) or 0.0

    def measured(record: TrialRecord) -> float:
        return record.step_s or 0.0

    error = prediction_error((predicted(r), measured(r)) for r in ran)
    if error is None:
        return None
    values = [value for r in ran for value in (predicted(r), measured(r))]
    figure = layout("predicted step (s)", "measured step (s)")
    if max(values) / min(values) > _LOG_FROM_RATIO:
        for axis in ("xaxis", "yaxis"):
            figure[axis]["type"] = "log"
    drawn, thinning = thinned(ran)
    marks = by_strategy(study, drawn, predicted, measured)
    return Chart(
        key="speed",
        title="Step time: predicted against measured",
        summary=f"{_error_words(error)} Above the line it ran slower than predicted. Hollow marks "
        f"are composed from measured parts.{thinning}",
        figure={"data": [identity_line(values), *marks], "layout": figure},
    )


def _predicted_step_s(study: Study, record: TrialRecord) -> float | None:
    """Return the predicted seconds of a step, from predicted tokens a second where need be."""
    if record.predicted_step_s or not record.predicted_tokens_per_s:
        return record.predicted_step_s
    workload = study.section("workload")
    seq_len, batch = workload.get("seq_len"), workload.get("global_batch_size")
    if not isinstance(seq_len, int) or not isinstance(batch, int):
        return None
    return seq_len * batch / record.predicted_tokens_per_s


def _error_words(error: PredictionError) -> str:
    return (
        f"Median absolute error {words.percent(error.median)}, worst {words.percent(error.worst)}, "
        f"over {error.count:,} configuration{'s' * (error.count > 1)}."
    )


def _interval_words(records: Iterable[TrialRecord]) -> str:
    """Say how often the interval held what the limit counts; nothing of older studies."""
    inside = []
    for record in records:
        low, high = record.predicted_low_bytes, record.predicted_high_bytes
        real = words.memory_bytes(record)
        if low is not None and high is not None and real is not None:
            inside.append(low <= real <= high)
    if not inside:
        return ""
    return f"{sum(inside):,} of {len(inside):,} were inside their predicted 90% interval. "


def _misses_words(records: Iterable[TrialRecord]) -> str:
    """Say how often fitting was predicted wrongly, both ways: neither shows on the diagonal."""
    judged = [r for r in records if r.predicted_verdict is not None]
    surprises = sum(
        r.outcome is Outcome.OOM and str(r.predicted_verdict).lower() == "fits" for r in judged
    )
    refusals = sum(
        r.outcome is Outcome.OK and str(r.predicted_verdict).lower() == "oom" for r in judged
    )
    return (
        f"Predicted to fit and ran out of memory: {surprises}. "
        f"Predicted not to fit and ran: {refusals}."
    )
