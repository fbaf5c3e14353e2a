"""The page's charts as plain plotly figures: what is drawn, without its colours."""

from __future__ import annotations

from autotune.report.answer import Answer
from autotune.report.charts.figure import Chart, Figure
from autotune.report.charts.predictions import memory_prediction_chart, speed_prediction_chart
from autotune.report.charts.space import space_chart
from autotune.report.charts.steps import step_times_chart
from autotune.report.charts.throughput import throughput_chart
from autotune.report.charts.timeline import timeline_chart
from autotune.report.study import Study

__all__ = ["Chart", "Figure", "build_charts"]


def build_charts(study: Study, answer: Answer) -> list[Chart]:
    """Return the charts that have anything to draw."""
    charts = (
        throughput_chart(study, answer),
        memory_prediction_chart(study),
        speed_prediction_chart(study),
        step_times_chart(study),
        space_chart(study, answer),
        timeline_chart(study),
    )
    return [chart for chart in charts if chart is not None]
