"""The page's charts as plain plotly figures: what is drawn, without its colours.

A colour is a token such as ``@s0`` or ``@muted``; the page's script puts the light or the dark
theme's value in its place, so that one figure serves both.
"""

from __future__ import annotations

import html
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from autotune.report import words
from autotune.report.answer import Answer, pareto_front, standings
from autotune.report.study import Study
from autotune.trial.protocol import Outcome
from autotune.trial.record import TrialRecord
from autotune.units import GIB, MIB

Figure = dict[str, Any]
NUM_SERIES = 8
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "hexagon", "pentagon")
_MAX_BOXES = 12
_LOG_FROM_RATIO = 20.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """One figure with the words around it."""

    key: str
    title: str
    summary: str
    """What the figure shows, in words: caption, and the text a screen reader says."""
    figure: Figure
    height: int = 420


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictionError:
    """How far the predictions were from what was measured, as fractions of the measured value."""

    count: int
    median: float
    worst: float


def build_charts(study: Study, answer: Answer) -> list[Chart]:
    """Return the charts that have anything to draw."""
    charts = (
        throughput_chart(study, answer),
        memory_prediction_chart(study),
        time_prediction_chart(study),
        step_times_chart(study),
    )
    return [chart for chart in charts if chart is not None]


def prediction_error(pairs: Iterable[tuple[float, float]]) -> PredictionError | None:
    """Return the relative errors of ``(predicted, measured)`` pairs; None without any."""
    errors = [abs(predicted - measured) / measured for predicted, measured in pairs if measured > 0]
    if not errors:
        return None
    return PredictionError(count=len(errors), median=statistics.median(errors), worst=max(errors))


def throughput_chart(study: Study, answer: Answer) -> Chart | None:
    """Tokens/s over memory, with the front nothing else beats in both."""
    ran = [r for r in standings(study.records) if words.memory_bytes(r) is not None]
    if not ran:
        return None
    unit, unit_name = _unit(words.memory_bytes(r) or 0 for r in ran)

    def memory(record: TrialRecord) -> float:
        return (words.memory_bytes(record) or 0) / unit

    front = pareto_front(ran)
    traces: list[Figure] = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": "Pareto front",
            "x": [memory(r) for r in front],
            "y": [r.tokens_per_s for r in front],
            "line": {"shape": "hv", "dash": "dot", "width": 1.5, "color": "@muted"},
            "hoverinfo": "skip",
        },
        *_by_strategy(study, ran, memory, lambda r: r.tokens_per_s or 0.0),
    ]
    if answer.winner is not None and words.memory_bytes(answer.winner) is not None:
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "the answer",
                "x": [memory(answer.winner)],
                "y": [answer.winner.tokens_per_s],
                "marker": {
                    "symbol": "circle-open",
                    "size": 20,
                    "color": "@accent",
                    "line": {"width": 2},
                },
                "hoverinfo": "skip",
            }
        )
    layout = _layout(f"memory of a rank ({unit_name})", "tokens/s")
    layout["yaxis"]["rangemode"] = "tozero"
    return Chart(
        key="throughput",
        title="Throughput against memory",
        summary=f"{len(ran)} configurations that ran; {len(front)} of them are on the front: no "
        "other is both faster and smaller. Hollow marks are composed, not run at their own "
        "accumulation.",
        figure={"data": traces, "layout": layout},
    )


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
    unit, unit_name = _unit(r.peak_allocated_bytes or 0 for r in ran)
    predicted = [(r.predicted_bytes or 0) / unit for r in ran]
    allocated = [(r.peak_allocated_bytes or 0) / unit for r in ran]
    reserved = [r for r in ran if r.peak_reserved_bytes is not None]
    traces = [
        _diagonal([*predicted, *allocated]),
        *_by_strategy(
            study,
            ran,
            lambda r: (r.predicted_bytes or 0) / unit,
            lambda r: (r.peak_allocated_bytes or 0) / unit,
        ),
        {
            "type": "scatter",
            "mode": "markers",
            "name": "reserved",
            "visible": "legendonly",
            "x": [(r.predicted_bytes or 0) / unit for r in reserved],
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
        f"{_misses_words(study.records)}",
        figure={
            "data": traces,
            "layout": _layout(f"predicted ({unit_name})", f"measured ({unit_name})"),
        },
    )


def time_prediction_chart(study: Study) -> Chart | None:
    """Optimizer step, predicted against measured."""
    ran = [r for r in standings(study.records) if r.predicted_step_s and r.step_s]
    error = prediction_error((r.predicted_step_s or 0.0, r.step_s or 0.0) for r in ran)
    if error is None:
        return None
    predicted = [r.predicted_step_s or 0.0 for r in ran]
    measured = [r.step_s or 0.0 for r in ran]
    layout = _layout("predicted step (s)", "measured step (s)")
    if max(*predicted, *measured) / min(*predicted, *measured) > _LOG_FROM_RATIO:
        for axis in ("xaxis", "yaxis"):
            layout[axis]["type"] = "log"
    traces = [
        _diagonal([*predicted, *measured]),
        *_by_strategy(study, ran, lambda r: r.predicted_step_s or 0.0, lambda r: r.step_s or 0.0),
    ]
    return Chart(
        key="time",
        title="Step time: predicted against measured",
        summary=f"{_error_words(error)} Hollow marks are composed from measured parts.",
        figure={"data": traces, "layout": layout},
    )


def step_times_chart(study: Study) -> Chart | None:
    """Spread of the counted steps of the fastest configurations, around their own medians."""
    ran = [r for r in standings(study.records) if len(r.step_times_s) > 1][:_MAX_BOXES]
    if not ran:
        return None
    traces: list[Figure] = []
    for record in reversed(ran):  # plotly draws the first category at the bottom
        middle = statistics.median(record.step_times_s)
        accum = max(record.measured_accum_steps, default=None)
        at = f" at accumulation {accum}" if accum else ""
        traces.append(
            {
                "type": "box",
                "orientation": "h",
                "name": _text(words.plan_name(record.plan)).replace(" mbs=", "<br>mbs="),
                "x": [100 * (step / middle - 1) for step in record.step_times_s],
                "text": [f"{words.seconds(step)}{at}" for step in record.step_times_s],
                "hoverinfo": "text",
                "boxpoints": "all",
                "pointpos": 0,
                "jitter": 0.6,
                "marker": {"size": 4, "color": "@s0", "opacity": 0.7},
                "line": {"width": 1, "color": "@muted"},
                "fillcolor": "@band",
                "showlegend": False,
            }
        )
    layout = _layout("from its own median (%)", "")
    layout["xaxis"]["zeroline"] = True
    layout["yaxis"] |= {"showgrid": False, "ticksuffix": " "}
    steps = sum(len(r.step_times_s) for r in ran)
    return Chart(
        key="steps",
        title="Step times",
        summary=f"{steps} counted optimizer steps of the {len(ran)} fastest configurations, "
        "slowest rank, fastest configuration on top. Each is shown around its own median, since "
        "different accumulations make steps of different length.",
        figure={"data": traces, "layout": layout},
        height=110 + 44 * len(ran),
    )


def _by_strategy(
    study: Study,
    records: Sequence[TrialRecord],
    x: Callable[[TrialRecord], float],
    y: Callable[[TrialRecord], float],
) -> list[Figure]:
    """One trace a strategy; a strategy keeps its colour and symbol in every chart of the page."""
    names = sorted({_strategy(record) for record in study.records})
    traces: list[Figure] = []
    for index, name in enumerate(names):
        own = [record for record in records if _strategy(record) == name]
        if not own:
            continue
        # The ninth strategy has the first one's colour again, and another symbol.
        symbol = _SYMBOLS[(index + index // NUM_SERIES) % len(_SYMBOLS)]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": _text(name),
                "x": [x(r) for r in own],
                "y": [y(r) for r in own],
                "text": [_hover(r) for r in own],
                "hoverinfo": "text",
                "marker": {
                    "size": 9,
                    "color": f"@s{index % NUM_SERIES}",
                    "symbol": [symbol + "-open" * words.is_composed(r) for r in own],
                },
            }
        )
    return traces


def _strategy(record: TrialRecord) -> str:
    return str(record.plan.get("strategy", "unknown"))


def _hover(record: TrialRecord) -> str:
    composed = words.is_composed(record)
    return "<br>".join(
        (
            f"<b>{_text(words.plan_name(record.plan))}</b>",
            f"{words.rate(record.tokens_per_s, composed)} tokens/s",
            f"step {words.seconds(record.step_s, composed)}, predicted "
            f"{words.seconds(record.predicted_step_s)}",
            f"reserved {words.size(record.peak_reserved_bytes)}, allocated "
            f"{words.size(record.peak_allocated_bytes)}",
            f"predicted {words.size(record.predicted_bytes)}",
        )
    )


def _text(text: str) -> str:
    """Escape for plotly's labels, which read a subset of HTML."""
    return html.escape(words.clean(text), quote=False)


def _diagonal(values: Sequence[float]) -> Figure:
    ends = [min(values), max(values)]
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "predicted = measured",
        "x": ends,
        "y": ends,
        "line": {"dash": "dot", "width": 1.5, "color": "@muted"},
        "hoverinfo": "skip",
    }


def _layout(x_title: str, y_title: str) -> Figure:
    return {"xaxis": {"title": {"text": x_title}}, "yaxis": {"title": {"text": y_title}}}


def _unit(sizes: Iterable[int]) -> tuple[int, str]:
    return (GIB, "GiB") if max(sizes) >= GIB else (MIB, "MiB")


def _error_words(error: PredictionError) -> str:
    return (
        f"Median absolute error {words.percent(error.median)}, worst {words.percent(error.worst)}, "
        f"over {error.count} configuration{'s' * (error.count > 1)}."
    )


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
