"""The charts of a capacity plan as plain plotly figures; colours are tokens such as ``@s0``."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from typing import Any

from autotune.capacity import Cell, Fit, Question
from autotune.report import capacity_words as words
from autotune.report.charts.figure import NUM_SERIES, SYMBOLS, Chart

_LOG_FROM_RATIO = 10.0
_HEIGHT = 380


def build_charts(question: Question, cells: Sequence[Cell]) -> list[Chart]:
    """Return the charts that have anything to draw: time and cost, or what the limits allow."""
    wanted = []
    if question.tokens is None:
        title = f"Tokens {words.limit_words(question)}"
        wanted.append(_chart("tokens", title, "billions of tokens", cells, _billions))
    if question.tokens is not None or question.budget is not None:
        title = "Days" if question.tokens is not None else "Days they take"
        wanted.append(_chart("days", title, "days", cells, lambda c: c.days))
    if question.tokens is not None or question.budget is None:
        priced = [cell for cell in cells if cell.cost is not None]
        if priced:
            wanted.append(_chart("cost", "Cost", "cost", priced, lambda c: c.cost))
        else:
            wanted.append(_chart("hours", "GPU-hours", "GPU-hours", cells, lambda c: c.gpu_hours))
    return [chart for chart in wanted if chart is not None]


def _billions(cell: Cell) -> float | None:
    return None if cell.most_tokens is None else cell.most_tokens / 1e9


def _chart(
    key: str,
    title: str,
    unit: str,
    cells: Sequence[Cell],
    value: Callable[[Cell], float | None],
) -> Chart | None:
    drawn = [(cell, y) for cell in cells if (y := value(cell)) is not None]
    if not drawn:
        return None
    types = list(dict.fromkeys(cell.gpu_type for cell in cells))
    counts = sorted({cell.num_gpus for cell, _ in drawn})
    values = [y for _, y in drawn]
    traces = [
        _trace(index, name, [(c, y) for c, y in drawn if c.gpu_type == name], unit)
        for index, name in enumerate(types)
    ]
    y_axis: dict[str, Any] = {"title": {"text": unit}, "rangemode": "tozero"}
    if max(values) > _LOG_FROM_RATIO * min(values):
        ticks = _log_ticks(min(values), max(values))
        y_axis = {
            "title": {"text": f"{unit} (log)"},
            "type": "log",
            "tickvals": ticks,
            "ticktext": [f"{tick:,g}" for tick in ticks],
        }
    low, high = min(drawn, key=lambda e: e[1]), max(drawn, key=lambda e: e[1])
    return Chart(
        key=key,
        height=_HEIGHT,
        title=f"{title} by number of GPUs",
        summary=f"{title}: from {words.figure(low[1])} on {low[0].describe()} to "
        f"{words.figure(high[1])} on {high[0].describe()}. Hollow marks are at risk of not "
        "fitting; what does not fit is not drawn.",
        figure={
            "data": [trace for trace in traces if trace["x"]],
            "layout": {
                "xaxis": {
                    "title": {"text": "GPUs"},
                    "type": "log",
                    "tickvals": counts,
                    "ticktext": [str(count) for count in counts],
                },
                "yaxis": y_axis,
                "showlegend": True,
            },
        },
    )


def _log_ticks(low: float, high: float) -> list[float]:
    """Return the values 1, 2 and 5 of each power of ten between, and one beyond each end."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**power for power in powers for step in (1, 2, 5)]
    inside = [tick for tick in ticks if low <= tick <= high]
    below = [tick for tick in ticks if tick < low][-1:]
    above = [tick for tick in ticks if tick > high][:1]
    return [*below, *inside, *above]


def _trace(index: int, name: str, points: Sequence[tuple[Cell, float]], unit: str) -> Any:
    colour = f"@s{index % NUM_SERIES}"
    symbol = SYMBOLS[(index + index // NUM_SERIES) % len(SYMBOLS)]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": html.escape(name, quote=False),
        "x": [cell.num_gpus for cell, _ in points],
        "y": [y for _, y in points],
        "text": [_hover(cell, y, unit) for cell, y in points],
        "hoverinfo": "text",
        "line": {"color": colour, "width": 2},
        "marker": {
            "size": 9,
            "color": colour,
            "symbol": [symbol + "-open" * (cell.fit is Fit.AT_RISK) for cell, _ in points],
        },
    }


def _hover(cell: Cell, value: float, unit: str) -> str:
    lines = (
        f"<b>{html.escape(cell.describe(), quote=False)}</b>",
        f"{words.figure(value)} {unit}",
        f"{words.figure(cell.tokens_per_s)} tokens/s, {cell.basis}",
        html.escape(words.configuration(cell), quote=False),
    )
    return "<br>".join(lines)
