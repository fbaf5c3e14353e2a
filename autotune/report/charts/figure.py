"""What the charts share: the figure itself, its marks, its labels, how many points it may have.

A colour is a token such as ``@s0`` or ``@muted``; the page's script puts the light or the dark
theme's value in its place, so that one figure serves both. Everything is SVG: plotly's WebGL traces
need a WebGL context, which remote desktops often lack, and code made at run time, which the page's
content security policy forbids.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from autotune.report import words
from autotune.report.study import Study
from autotune.trial.record import TrialRecord
from autotune.units import GIB, MIB

_T = TypeVar("_T")
Figure = dict[str, Any]
NUM_SERIES = 8
MAX_MARKS = 600
"""Configurations a chart draws: an SVG with thousands of marks is slow to draw and to hover."""
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "hexagon", "pentagon")


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """One figure with the words around it."""

    key: str
    title: str
    summary: str
    """What the figure shows, in words: caption, and the text a screen reader says."""
    figure: Figure
    height: int = 420
    """Pixels."""
    min_width: int = 0
    """Pixels; a narrower window scrolls the chart sideways."""


def thinned(
    items: Sequence[_T], always: Iterable[_T] = (), *, most: int = MAX_MARKS
) -> tuple[list[_T], str]:
    """Return at most `most` of the items, evenly by their order, and a sentence saying so.

    Args:
        items: Fastest first.
        always: Those that are kept whatever their place; the maximum is for the others.
        most: The maximum.
    """
    if len(items) <= most:
        return list(items), ""
    kept = {id(item) for item in always}
    step = len(items) / most
    kept |= {id(items[int(index * step)]) for index in range(most)}
    drawn = [item for item in items if id(item) in kept]
    return drawn, (
        f" {len(drawn):,} of {len(items):,} are drawn, evenly by speed; the table has all."
    )


def by_strategy(
    study: Study,
    records: Sequence[TrialRecord],
    x: Callable[[TrialRecord], float],
    y: Callable[[TrialRecord], float],
) -> list[Figure]:
    """Return one trace of marks a strategy."""
    traces: list[Figure] = []
    for name, colour, symbol in strategy_styles(study):
        own = [record for record in records if strategy_of(record) == name]
        if not own:
            continue
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": label(name),
                "x": [x(r) for r in own],
                "y": [y(r) for r in own],
                "text": [hover(r) for r in own],
                "hoverinfo": "text",
                "marker": {
                    "size": 9,
                    "color": colour,
                    "symbol": [symbol + "-open" * words.is_composed(r) for r in own],
                },
            }
        )
    return traces


def strategy_styles(study: Study) -> list[tuple[str, str, str]]:
    """Return name, colour and symbol of each strategy: the same in every chart of the page."""
    names = sorted({strategy_of(record) for record in study.records})
    # The ninth strategy has the first one's colour again, and another symbol.
    return [
        (
            name,
            f"@s{index % NUM_SERIES}",
            SYMBOLS[(index + index // NUM_SERIES) % len(SYMBOLS)],
        )
        for index, name in enumerate(names)
    ]


def strategy_of(record: TrialRecord) -> str:
    """Return the strategy's name."""
    return str(record.plan.get("strategy", "unknown"))


def hover(record: TrialRecord) -> str:
    """Return what the mouse over a configuration's mark shows."""
    composed = words.is_composed(record)
    return "<br>".join(
        (
            f"<b>{label(words.plan_name(record.plan))}</b>",
            f"{words.rate(record.tokens_per_s, composed)} tokens/s, predicted "
            f"{words.rate(record.predicted_tokens_per_s)}",
            f"step {words.seconds(record.step_s, composed)}, predicted "
            f"{words.seconds(record.predicted_step_s)}",
            f"reserved {words.size(record.peak_reserved_bytes)}, allocated "
            f"{words.size(record.peak_allocated_bytes)}",
            f"predicted {words.size(record.predicted_bytes)}, 90% interval "
            f"{words.predicted_interval(record)}",
        )
    )


def label(text: str) -> str:
    """Escape for plotly's labels, which read a subset of HTML."""
    return html.escape(words.clean(text), quote=False)


def identity_line(values: Sequence[float], name: str = "predicted = measured") -> Figure:
    """Return the line on which both axes say the same."""
    ends = [min(values), max(values)]
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": ends,
        "y": ends,
        "line": {"dash": "dot", "width": 1.5, "color": "@muted"},
        "hoverinfo": "skip",
    }


def layout(x_title: str, y_title: str) -> Figure:
    """Return the titles of both axes; the page's script adds the rest."""
    return {"xaxis": {"title": {"text": x_title}}, "yaxis": {"title": {"text": y_title}}}


def memory_unit(sizes: Iterable[int]) -> tuple[int, str]:
    """Return bytes of the unit that suits the largest size, and its name."""
    return (GIB, "GiB") if max(sizes) >= GIB else (MIB, "MiB")
