"""What each chart draws is what the records hold."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autotune.plan import CpBackend
from autotune.report import words
from autotune.report.answer import find_answer, pareto_front, standings
from autotune.report.charts import build_charts
from autotune.report.charts.figure import MAX_MARKS
from autotune.report.study import load_study
from autotune.report.trials_table import trials_table
from tests.unit.report_studies import (
    make_failure,
    make_plan,
    make_record,
    typical_records,
    write_study,
)


def _charts(tmp_path, records=None):
    study = load_study(write_study(tmp_path, records))
    return {chart.key: chart for chart in build_charts(study, find_answer(study))}


def _trace(chart, name):
    return next(trace for trace in chart.figure["data"] if trace["name"] == name)


def test_front_is_the_pareto_front_in_order_of_memory(tmp_path):
    records = typical_records()
    line = _trace(_charts(tmp_path, records)["throughput"], "Pareto front")
    front = pareto_front(standings(records))
    assert line["y"] == [record.tokens_per_s for record in front]
    assert line["x"] == sorted(line["x"]) and len(line["x"]) > 1


@pytest.mark.parametrize("recorded", [True, False])
def test_step_time_is_compared_with_its_prediction_beside_the_identity_line(tmp_path, recorded):
    """Not tokens/s: measured ones have a label, and here a quarter of the positions has one."""
    step = {"predicted_step_s": 1.6} if recorded else {"predicted_step_s": None}
    record = make_record(
        make_plan(),
        step_s=2.0,
        tokens_per_s=64 * 512 / 4 / 2.0,
        predicted_tokens_per_s=64 * 512 / 1.6,
        **step,
    )
    chart = _charts(tmp_path, [record])["speed"]
    mark = _trace(chart, "zero2")
    assert (mark["x"], mark["y"]) == ([1.6], [2.0])
    line = _trace(chart, "predicted = measured")
    assert line["x"] == line["y"] == [1.6, 2.0]
    assert "Median absolute error 20%" in chart.summary


def test_timeline_has_a_bar_a_launch_and_a_mark_a_trial_by_outcome(tmp_path):
    plan = make_plan("zero2")
    at = {"started_at": "2026-01-31T12:00:00Z", "launch_s": 40.0}
    records = [
        make_record(plan, **at),
        replace(make_failure(make_plan("zero2", 8)), **at),
        replace(make_record(make_plan("zero3"), launch=2), started_at="2026-01-31T13:01:00+01:00"),
    ]
    chart = _charts(tmp_path, records)["timeline"]
    bars = _trace(chart, "launch")
    assert bars["x"][:3] == ["2026-01-31T12:00:00", "2026-01-31T12:00:40", None]
    assert bars["x"][3] == "2026-01-31T12:01:00", "a time with an offset is shown in UTC"
    assert bars["y"] == ["zero2", "zero2", None, "zero3", "zero3", None]
    assert len(_trace(chart, "ok")["x"]) == 2
    failed = _trace(chart, "out of memory")
    assert "2026-01-31T12:00:00" < failed["x"][0] < "2026-01-31T12:00:40"
    assert failed["marker"]["symbol"] != _trace(chart, "ok")["marker"]["symbol"]
    assert chart.summary.startswith("2 launches")
    # The first of the launch comes first, and the first strategy's row, drawn last, is on top.
    assert _trace(chart, "ok")["x"][0] < failed["x"][0]
    assert chart.figure["layout"]["yaxis"]["categoryarray"] == ["zero3", "zero2"]


def test_launches_are_drawn_in_the_order_they_ran(tmp_path):
    at = "2026-01-31T12:0{}:00+00:00"
    plans = [make_plan(name) for name in ("zero3", "zero1", "zero2")]
    records = [make_record(p, launch=n, started_at=at.format(n)) for n, p in enumerate(plans)]
    starts = _trace(_charts(tmp_path, records)["timeline"], "launch")["x"][::3]
    assert starts == [f"2026-01-31T12:0{number}:00" for number in range(3)]


def test_steps_are_shown_around_their_median_fastest_on_top(tmp_path):
    fast = make_record(make_plan("zero2"), step_s=2.0, step_times_s=(2.0, 1.0, 5.0))
    slow = make_record(make_plan("zero3"), step_s=4.0, step_times_s=(4.0, 4.0, 8.0))
    below, top = _charts(tmp_path, [fast, slow])["steps"].figure["data"]
    assert top["x"] == [0.0, -50.0, 150.0] and below["x"] == [0.0, 0.0, 100.0]
    assert top["name"].startswith("zero2") and below["name"].startswith("zero3")


@pytest.mark.parametrize("started", ["", "yesterday"])
def test_launch_without_a_time_has_no_bar(tmp_path, started):
    assert "timeline" not in _charts(tmp_path, [make_record(make_plan(), started_at=started)])


def test_space_has_a_line_a_plan_through_the_settings_that_vary(tmp_path):
    chart = _charts(tmp_path)["space"]
    titles = chart.figure["layout"]["xaxis"]["ticktext"]
    assert titles == [
        "strategy",
        "cp",
        "recompute",
        "micro batch",
        "accumulation",
        "tokens/s",
    ]
    lines = [t for t in chart.figure["data"] if t["name"] not in ("the answer",)]
    assert sum(trace["y"].count(None) for trace in lines) == 16 + 6
    failed = _trace(chart, "did not run to the end")
    assert failed["line"]["dash"] == "dot", "not by colour alone"
    assert all(y < 0 for y in failed["y"][len(titles) - 1 :: len(titles) + 1])
    answer = _trace(chart, "the answer")
    assert answer["y"][len(titles) - 1] == 1.0 and answer["text"][0].startswith("<b>zero2 mbs=4")


def test_setting_that_is_everywhere_the_same_is_told_instead_of_drawn(tmp_path):
    records = [make_record(make_plan("zero2", micro), step_s=2.0) for micro in (1, 2)]
    chart = _charts(tmp_path, records)["space"]
    assert chart.figure["layout"]["xaxis"]["ticktext"] == [
        "micro batch",
        "accumulation",
        "tokens/s",
    ]
    assert "The same everywhere: strategy zero2, cp 1, recompute none." in chart.summary


def test_layouts_and_rings_have_an_axis_where_they_vary(tmp_path):
    changes = ({}, {"tp": 2, "dp_shard": 1}, {"cp": 2, "dp_shard": 1, "cp_backend": CpBackend.RING})
    records = [make_record(make_plan("fsdp2", **change), step_s=2.0) for change in changes]
    titles = _charts(tmp_path, records)["space"].figure["layout"]["xaxis"]["ticktext"]
    assert titles == ["cp", "split by", "tp", "tokens/s"]


def test_thousands_of_marks_are_thinned_and_the_caption_says_so(tmp_path):
    records = [
        make_record(
            make_plan("zero2", bucket_elements=number),
            launch=number,
            step_s=1 + number / 1000,
            peak_reserved_bytes=1_000_000_000 - 1000 * number,
        )
        for number in range(1, 3 * MAX_MARKS)
    ]
    charts = _charts(tmp_path, records)
    marks = _trace(charts["memory"], "zero2")
    assert MAX_MARKS * 0.9 < len(marks["x"]) <= MAX_MARKS
    assert f"{len(marks['x']):,} of {len(records):,} are drawn" in charts["memory"].summary
    # Slower is smaller here, so all are on the front: none of it may go.
    assert len(_trace(charts["throughput"], "Pareto front")["x"]) == len(records)
    assert len(_trace(charts["throughput"], "zero2")["x"]) == len(records)
    assert "Every 3th launch" in charts["timeline"].summary


def test_intervals_are_shown_and_counted(tmp_path):
    bounds = {"predicted_low_bytes": 300 << 20, "predicted_high_bytes": 500 << 20}
    records = [
        make_record(
            make_plan("zero2", micro), peak_reserved_bytes=took << 20, predicted_verdict="at_risk",
            predicted_fit_probability=0.423, **bounds,
        )
        for micro, took in ((1, 310), (2, 499), (4, 501))
    ]  # fmt: skip
    summary = _charts(tmp_path / "new", records)["memory"].summary
    assert "2 of 3 were inside their predicted 90% interval." in summary
    study = load_study(tmp_path / "new")
    table = trials_table(study, find_answer(study))
    titles = [column.title for column in table.columns]
    shown = dict(zip(titles, (cell.text for cell in table.rows[0].cells), strict=True))
    assert shown["90% interval"] == "300.0 MiB to 500.0 MiB"
    assert shown["Chance to fit"] == "42%, at risk"


def test_a_study_of_before_the_intervals_is_shown_without(tmp_path):
    """Its records have a verdict and no interval."""
    summary = _charts(tmp_path, [make_record(make_plan())])["memory"].summary
    assert "interval" not in summary
    study = load_study(tmp_path)
    table = trials_table(study, find_answer(study))
    assert len(table.columns) == len(table.rows[0].cells)
    texts = [cell.text for cell in table.rows[0].cells]
    assert texts[-3:-1] == [words.NOT_MEASURED, "fits"]
