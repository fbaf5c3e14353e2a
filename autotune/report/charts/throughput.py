"""Tokens a second over memory."""

from __future__ import annotations

from autotune.report import words
from autotune.report.answer import Answer, pareto_front, standings
from autotune.report.charts.figure import (
    Chart,
    Figure,
    by_strategy,
    layout,
    memory_unit,
    thinned,
)
from autotune.report.study import Study
from autotune.trial.record import TrialRecord


def throughput_chart(study: Study, answer: Answer) -> Chart | None:
    """Tokens/s over memory, with the front nothing else beats in both, and the memory limit."""
    ran = [r for r in standings(study.records) if words.memory_bytes(r) is not None]
    if not ran:
        return None
    unit, unit_name = memory_unit(words.memory_bytes(r) or 0 for r in ran)

    def memory(record: TrialRecord) -> float:
        return (words.memory_bytes(record) or 0) / unit

    front = pareto_front(ran)
    drawn, thinning = thinned(ran, front)
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
        *by_strategy(study, drawn, memory, lambda r: r.tokens_per_s or 0.0),
    ]
    if answer.winner is not None and words.memory_bytes(answer.winner) is not None:
        traces.append(_ring(memory(answer.winner), answer.winner.tokens_per_s))
    figure = layout(f"memory of a rank ({unit_name})", "tokens/s")
    figure["yaxis"]["rangemode"] = "tozero"
    return Chart(
        key="throughput",
        title="Throughput against memory",
        summary=f"{len(ran):,} configurations that ran; {len(front)} of them are on the front: no "
        "other is both faster and smaller. Hollow marks are composed, not run at their own "
        f"accumulation.{thinning}",
        figure={"data": traces, "layout": figure},
    )


def _ring(x: float, y: float | None) -> Figure:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "the answer",
        "x": [x],
        "y": [y],
        "marker": {
            "symbol": "circle-open",
            "size": 20,
            "color": "@accent",
            "line": {"width": 2},
        },
        "hoverinfo": "skip",
    }
