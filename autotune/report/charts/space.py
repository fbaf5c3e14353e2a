"""The space as parallel coordinates: one line a configuration, from its settings to its speed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from autotune.report import words
from autotune.report.answer import Answer, standings
from autotune.report.charts.figure import (
    Chart,
    Figure,
    hover,
    label,
    strategy_of,
    strategy_styles,
    thinned,
)
from autotune.report.study import Study
from autotune.trial.protocol import Outcome
from autotune.trial.record import TrialRecord

_Value = str | int | float
_SETTINGS: tuple[tuple[str, str], ...] = (
    ("strategy", "strategy"),
    ("cp", "cp"),
    ("cp_backend", "split by"),
    ("tp", "tp"),
    ("recompute", "recompute"),
    ("micro_batch_size", "micro batch"),
    ("grad_accum_steps", "accumulation"),
)
_USUAL: dict[str, _Value] = {"cp_backend": "ulysses", "tp": 1}
"""What records from before a setting was there ran with; not worth a word where all did."""
_MAX_LINES = 200
_SPREAD = 0.05
"""Height over which the lines through one value are spread, so that they do not hide each other."""
_FAILED_AT = -0.14
"""Below the slowest: where the lines of configurations without a speed end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Axis:
    """One upright axis: where a record crosses it (0 to 1), and its labels."""

    title: str
    place: Callable[[TrialRecord], float]
    ticks: Sequence[tuple[float, str]]


def space_chart(study: Study, answer: Answer) -> Chart | None:
    """Lines from what plans differ in (strategy, cp, recompute, ...) to tokens/s."""
    ran = standings(study.records)
    if not ran:
        return None
    measured = {record.plan_id for record in ran}
    failed = [
        r
        for r in {r.plan_id: r for r in study.records}.values()
        if r.plan_id not in measured and r.outcome is not Outcome.INTERRUPTED
    ]
    drawn, thinning = thinned([*ran, *failed], most=_MAX_LINES)
    axes, constant = _axes([*ran, *failed], ran)
    traces = [
        *(
            _lines(name, [r for r in drawn if strategy_of(r) == name and r.tokens_per_s], axes)
            | {"line": {"color": colour, "width": 1.3}}
            for name, colour, _ in strategy_styles(study)
        ),
        _lines("did not run to the end", [r for r in drawn if not r.tokens_per_s], axes)
        | {"line": {"color": "@bad", "width": 1.3, "dash": "dot"}},
    ]
    if answer.winner is not None:
        traces.append(
            _lines("the answer", [answer.winner], axes) | {"line": {"color": "@accent", "width": 4}}
        )
    alike = f" The same everywhere: {', '.join(constant)}." if constant else ""
    return Chart(
        key="space",
        title="The space",
        summary=f"One line a configuration, from its settings to its tokens/s: {len(ran):,} that "
        f"ran and {len(failed):,} that did not. Lines through one value are spread a little. A "
        f"click on a name in the legend hides or shows its lines.{alike}{thinning}",
        figure={
            "data": [trace for trace in traces if trace["x"]],
            "layout": _layout(axes, bool(failed)),
        },
        height=460,
        min_width=760,
    )


def _axes(
    records: Sequence[TrialRecord], ran: Sequence[TrialRecord]
) -> tuple[list[_Axis], list[str]]:
    """Return the axes with more than one value, and the settings that have only one."""
    axes: list[_Axis] = []
    constant: list[str] = []
    for key, title in _SETTINGS:
        values = sorted({_setting(r, key) for r in records}, key=_order)
        if len(values) < 2:
            if values[0] != _USUAL.get(key):
                constant.append(f"{title} {words.clean(values[0])}")
            continue
        places = {value: index / (len(values) - 1) for index, value in enumerate(values)}
        axes.append(
            _Axis(
                title=title,
                place=partial(_place, key, places),
                ticks=[(place, label(str(value))) for value, place in places.items()],
            )
        )
    return [*axes, _speed_axis(ran)], constant


def _place(key: str, places: Mapping[_Value, float], record: TrialRecord) -> float:
    return places[_setting(record, key)]


def _setting(record: TrialRecord, key: str) -> _Value:
    value = record.plan.get(key, _USUAL.get(key))
    return value if isinstance(value, str | int | float) else str(value)


def _order(value: object) -> tuple[bool, float, str]:
    number = float(value) if isinstance(value, int | float) else 0.0
    return (not isinstance(value, int | float), number, str(value))


def _speed_axis(ran: Sequence[TrialRecord]) -> _Axis:
    top = max(r.tokens_per_s or 0.0 for r in ran)
    ticks = [(share, words.rate(share * top)) for share in (0.25, 0.5, 0.75, 1.0)]
    return _Axis(
        title="tokens/s",
        place=lambda r: (r.tokens_per_s or 0.0) / top if r.tokens_per_s else _FAILED_AT,
        ticks=[(0.0, "0"), *ticks, (_FAILED_AT, "failed")],
    )


def _lines(name: str, records: Sequence[TrialRecord], axes: Sequence[_Axis]) -> Figure:
    """One trace for all lines of a name: a gap (None) ends each."""
    xs: list[float | None] = []
    ys: list[float | None] = []
    texts: list[str] = []
    for index, record in enumerate(records):
        # Multiples of the golden ratio: neighbours in the list end up far apart.
        offset = _SPREAD * ((index * 0.618) % 1 - 0.5)
        text = hover(record)
        for position, axis in enumerate(axes):
            exact = position == len(axes) - 1
            xs.append(position)
            ys.append(round(axis.place(record) + (0.0 if exact else offset), 5))
            texts.append(text)
        xs.append(None)
        ys.append(None)
        texts.append("")
    return {
        "type": "scatter",
        "mode": "lines",
        "name": label(name),
        "x": xs,
        "y": ys,
        "text": texts,
        "hoverinfo": "text",
        "opacity": 0.75,
    }


def _layout(axes: Sequence[_Axis], any_failed: bool) -> Figure:
    last = len(axes) - 1
    annotations = [
        {
            "x": position,
            "y": place,
            "text": text,
            "showarrow": False,
            "xanchor": "right" if position == 0 else "left",
            "xshift": -6 if position == 0 else 6,
            "bgcolor": "@bg",
            "borderpad": 1,
        }
        for position, axis in enumerate(axes)
        for place, text in axis.ticks
        if any_failed or place != _FAILED_AT
    ]
    upright = [
        {
            "type": "line",
            "x0": position,
            "x1": position,
            "y0": 0,
            "y1": 1,
            "layer": "below",
            "line": {"color": "@muted", "width": 1},
        }
        for position in range(len(axes))
    ]
    return {
        "xaxis": {
            "tickvals": list(range(len(axes))),
            "ticktext": [axis.title for axis in axes],
            "range": [-0.2 - 0.05 * max(len(text) for _, text in axes[0].ticks), last + 0.45],
            "showgrid": False,
            "fixedrange": True,
        },
        "yaxis": {
            "visible": False,
            "range": [(_FAILED_AT if any_failed else 0) - 0.08, 1.08],
            "fixedrange": True,
        },
        "annotations": annotations,
        "shapes": upright,
    }
