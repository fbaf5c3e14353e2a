"""The figures of `make bench-search`: from replayed searches to what passes and what is short."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("optuna")

import replay
from landscape import Landscape
from replay import Replayed, Step, exhaustive_s, one_launch_each_s

from tests.unit.search_landscape import COLD_S, READY_S, made_up

# By its file: benchmarks/memory has a module of this name as well.
_FILE = Path(replay.__file__).with_name("report.py")
_SPEC = importlib.util.spec_from_file_location("search_report", _FILE)
assert _SPEC is not None and _SPEC.loader is not None
report = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(report)

ANSWER_AT = 0.05
"""Share of the exhaustive cost after which the made-up searches have their answer."""


@pytest.fixture(scope="module")
def land(tmp_path_factory) -> Landscape:
    return made_up(tmp_path_factory.mktemp("landscapes"))


def searched(land: Landscape, sampler: str, regret: float, **changes: object) -> Replayed:
    whole_s = exhaustive_s(land)
    values = {
        "landscape": land.name,
        "sampler": sampler,
        "seed": 0,
        "steps": (Step(spent_s=ANSWER_AT * whole_s, regret=regret, gap=regret + 0.01),),
        "spent_s": 0.2 * whole_s,
        "launches": 3,
        "most_launches_an_arm": 1,
        "records": 5,
        "because": "",
    }
    return Replayed(**(values | changes))


def found(land: Landscape, searches: list[Replayed]) -> dict[str, tuple[float, bool | None]]:
    figures = report.figures_of(land, searches)
    return {figure["figure"]: (figure["value"], figure["passed"]) for figure in figures}


def area(regret: float) -> float:
    return ANSWER_AT + (1 - ANSWER_AT) * regret


def test_ours_is_held_to_its_bars_and_others_are_told(land):
    ours = [searched(land, "cost-model", regret) for regret in [0.02] * 18 + [0.05, 0.9]]
    figures = found(land, [*ours, searched(land, "random", 0.5)])
    assert figures["median regret after 10%, cost-model"] == (0.02, True)
    assert figures["95th percentile after 10%, cost-model"] == (0.05, True), "19 of 20"
    assert figures["median regret after 10%, random"] == (0.5, None)
    worse = [searched(land, "cost-model", regret) for regret in [0.021] * 18 + [0.9, 0.9]]
    figures = found(land, worse)
    assert figures["median regret after 10%, cost-model"] == (0.021, False)
    assert figures["95th percentile after 10%, cost-model"] == (0.9, False)


def test_an_answer_after_a_tenth_of_the_cost_is_too_late(land):
    late = Step(spent_s=0.11 * exhaustive_s(land), regret=0.0, gap=0.0)
    figures = found(land, [searched(land, "cost-model", 0.0, steps=(late,))])
    assert figures["median regret after 10%, cost-model"] == (1.0, False)


def test_areas_are_compared_with_the_best_other_and_with_tpe_at_its_best(land):
    searches = [
        searched(land, "cost-model", 0.1),
        searched(land, "cost-model+formulas", 0.0),
        searched(land, "tpe", 0.9),
        searched(land, "tpe+rungs", 0.4),
        searched(land, "random", 0.2),
    ]
    figures = found(land, searches)
    over_best, passed = figures["area over the best other sampler's"]
    assert over_best == pytest.approx(area(0.1) / area(0.2)) and passed
    over_tpe, passed = figures["area over TPE's"]
    assert over_tpe == pytest.approx(area(0.1) / area(0.4)) and passed
    searches[-1] = searched(land, "random", 0.1)
    assert found(land, searches)["area over the best other sampler's"] == (1.0, False), "a draw"
    searches[3] = searched(land, "tpe+rungs", 0.15)
    assert found(land, searches)["area over TPE's"][1] is False


def test_a_second_launch_of_an_arm_is_short(land):
    twice = searched(land, "cost-model", 0.0, most_launches_an_arm=2)
    figures = found(land, [searched(land, "cost-model", 0.0), twice])
    assert figures["most launches of one arm"] == (2, False)
    assert found(land, [searched(land, "cost-model", 0.0)])["most launches of one arm"][1]


def test_the_launchers_gain_is_apart_from_the_samplers(land):
    figures = found(land, [searched(land, "cost-model", 0.0)])
    ladder, _ = figures["launcher: ladder, cost over one launch each"]
    assert ladder == pytest.approx(exhaustive_s(land) / one_launch_each_s(land, cold=False))
    both, _ = figures["launcher: fork and ladder, cost over cold one launch each"]
    assert both == pytest.approx(exhaustive_s(land) / one_launch_each_s(land, cold=True))
    forked, passed = figures["fork start over cold start, fsdp2"]
    assert forked == pytest.approx(READY_S / COLD_S) and passed


def test_percentiles_are_values_that_were_seen():
    values = [float(n) for n in range(1, 21)]
    assert report.percentile(values, 0.95) == 19.0
    assert report.percentile(values, 1.0) == 20.0 and report.percentile([3.0], 0.95) == 3.0


def test_tables_say_what_the_searches_were(land, tmp_path):
    searches = [searched(land, "tpe", 0.25), searched(land, "tpe", 0.35, seed=1)]
    figures = report.figures_of(land, searches)
    report.write_results(tmp_path, {land.name: land}, searches, figures)
    rows = {name: read(tmp_path / f"{name}.csv") for name in ("searches", "regret", "figures")}
    assert [row["regret_after_10_percent"] for row in rows["searches"]] == ["0.25", "0.35"]
    assert len(rows["figures"]) == len(figures)
    early, late = rows["regret"][0], rows["regret"][-1]
    assert float(early["share_of_exhaustive"]) < ANSWER_AT and early["median_regret"] == "1.0"
    assert float(late["share_of_exhaustive"]) == pytest.approx(1.0)
    assert (late["median_regret"], late["p95_regret"]) == ("0.3", "0.35")


def read(path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
