"""Two studies: the speed of each plan in one over its speed in the other."""

from __future__ import annotations

from collections.abc import Sequence

from autotune.report import words
from autotune.report.answer import relative_half_width
from autotune.report.charts.figure import Chart, Figure, identity_line, label, layout, thinned
from autotune.report.compare import Comparison, Pair, Verdict
from autotune.trial.record import TrialRecord

_MARKS = {
    Verdict.FASTER: ("triangle-up", "@accent"),
    Verdict.SLOWER: ("triangle-down", "@bad"),
    Verdict.TIE: ("circle-open", "@s0"),
    Verdict.UNKNOWN: ("square-open", "@muted"),
}
"""Each verdict has a shape of its own: the colour only helps."""


def pairs_chart(comparison: Comparison) -> Chart | None:
    """Tokens/s of the second study over those of the first, with both intervals."""
    ran = [pair for pair in comparison.pairs if pair.ratio is not None]
    if not ran:
        return None
    drawn, thinning = thinned(ran)
    speeds = [r.tokens_per_s or 0.0 for pair in drawn for r in (pair.first, pair.second)]
    traces = [identity_line(speeds, "equally fast")]
    for verdict in _MARKS:
        own = [pair for pair in drawn if pair.verdict is verdict]
        if own:
            traces.append(_trace(verdict, own))
    return Chart(
        key="pairs",
        title="Tokens/s in one against the other",
        summary=f"{len(ran):,} plans that ran in both. Above the line the second was faster. The "
        f"bars are plus and minus half the 95% interval of each.{thinning}",
        figure={
            "data": traces,
            "layout": layout("first, tokens/s", "second, tokens/s"),
        },
    )


def _trace(verdict: Verdict, pairs: Sequence[Pair]) -> Figure:
    symbol, colour = _MARKS[verdict]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": str(verdict),
        "x": [pair.first.tokens_per_s for pair in pairs],
        "y": [pair.second.tokens_per_s for pair in pairs],
        "error_x": _bars([pair.first for pair in pairs]),
        "error_y": _bars([pair.second for pair in pairs]),
        "text": [_hover(pair) for pair in pairs],
        "hoverinfo": "text",
        "marker": {"size": 9, "symbol": symbol, "color": colour},
    }


def _bars(records: Sequence[TrialRecord]) -> Figure:
    halves = [(r.tokens_per_s or 0.0) * (relative_half_width(r) or 0.0) for r in records]
    return {"type": "data", "array": halves, "color": "@muted", "thickness": 1, "width": 0}


def _hover(pair: Pair) -> str:
    noise = words.NOT_MEASURED if pair.noise is None else words.percent(pair.noise)
    return "<br>".join(
        (
            f"<b>{label(words.plan_name(pair.first.plan))}</b>",
            f"first {words.rate(pair.first.tokens_per_s)} tokens/s",
            f"second {words.rate(pair.second.tokens_per_s)} tokens/s",
            f"ratio {pair.ratio or 0:.3f}, noise {noise}",
        )
    )
