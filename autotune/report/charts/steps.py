"""How the counted steps of a configuration scatter."""

from __future__ import annotations

import statistics

from autotune.report import words
from autotune.report.answer import standings
from autotune.report.charts.figure import Chart, Figure, label, layout
from autotune.report.study import Study

_MAX_BOXES = 12


def step_times_chart(study: Study) -> Chart | None:
    """Spread of the counted steps of the fastest configurations, around their own medians."""
    ran = [r for r in standings(study.records) if len(r.step_times_s) > 1]
    shown = ran[:_MAX_BOXES]
    if not shown:
        return None
    traces: list[Figure] = []
    for record in reversed(shown):  # plotly draws the first category at the bottom
        middle = statistics.median(record.step_times_s)
        accum = max(record.measured_accum_steps, default=None)
        at = f" at accumulation {accum}" if accum else ""
        traces.append(
            {
                "type": "box",
                "orientation": "h",
                "name": label(words.plan_name(record.plan)).replace(" mbs=", "<br>mbs="),
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
    figure = layout("from its own median (%)", "")
    figure["xaxis"]["zeroline"] = True
    figure["yaxis"] |= {"showgrid": False, "ticksuffix": " "}
    steps = sum(len(r.step_times_s) for r in shown)
    others = f" The other {len(ran) - len(shown):,} are not drawn." if len(ran) > len(shown) else ""
    return Chart(
        key="steps",
        title="Step times",
        summary=f"{steps} counted optimizer steps of the {len(shown)} fastest configurations, "
        "slowest rank, fastest configuration on top. Each is shown around its own median, since "
        f"different accumulations make steps of different length.{others}",
        figure={"data": traces, "layout": figure},
        height=110 + 44 * len(shown),
    )
