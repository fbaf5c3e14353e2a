"""What the page, the terminal and the charts of a capacity plan show is what its cells hold."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autotune.capacity import Question, make_cells
from autotune.report import capacity_console, capacity_page, capacity_words
from autotune.report.capacity_charts import build_charts
from autotune.spec.model import load_model
from autotune.spec.strategy import load_strategies
from autotune.spec.workload import Workload

QUESTION = Question(
    model=load_model("qwen3-0.6b"),
    workload=Workload(),
    tokens=10**9,
    prices={"h100": 2.5, "l40s": 0.9},
    with_power=True,
)
BUDGET = replace(QUESTION, tokens=None, budget=500.0)


def cells_of(question):
    types = {"h100": "h100", "l40s": "l40s"}
    return make_cells(question, types, [1, 4], load_strategies(["ddp"]))


@pytest.mark.parametrize("question", [QUESTION, BUDGET])
def test_each_column_shows_its_own_figure(question):
    cells = cells_of(question)
    page = {column.name: column for column in capacity_page._values(question)}
    console = {column.header: column for column in capacity_console._columns(question)}
    for cell in cells:
        own = {
            ("Tokens/s", "tokens/s"): cell.tokens_per_s,
            ("Days", "days"): cell.days,
            ("GPU-hours", "GPU-h"): cell.gpu_hours,
            ("Cost", "cost"): cell.cost,
            ("kWh", "kWh"): cell.kwh,
        }
        for (name, header), value in own.items():
            assert value is not None and page[name].sort(cell) == value
            assert page[name].text(cell) == capacity_words.figure(value)
            assert console[header].value(cell) == capacity_words.figure(value)
        texts = [capacity_words.figure(value) for value in own.values()]
        assert len(set(texts)) == len(texts), "no two columns look alike"


def test_charts_draw_the_cells_in_the_unit_they_name():
    cells = cells_of(BUDGET)
    charts = {chart.key: chart.figure for chart in build_charts(BUDGET, cells)}
    drawn = [y for trace in charts["tokens"]["data"] for y in trace["y"]]
    assert drawn == [cell.tokens_in_budget / 1e9 for cell in cells]
    assert charts["tokens"]["layout"]["yaxis"]["title"]["text"].startswith("billions of tokens")
    cells = cells_of(QUESTION)
    charts = {chart.key: chart.figure for chart in build_charts(QUESTION, cells)}
    for key, values in (("days", [c.days for c in cells]), ("cost", [c.cost for c in cells])):
        assert [y for trace in charts[key]["data"] for y in trace["y"]] == values


def test_a_deadline_has_no_slack():
    cell = cells_of(QUESTION)[0]
    for share, meets in ((1.0, True), (0.999, False)):
        question = replace(QUESTION, deadline_s=cell.train_s * share)
        assert replace(cell, question=question).meets_deadline is meets
