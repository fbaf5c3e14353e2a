"""Which finalist wins, by its confirming launches."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autotune.search.confirm import finalists_of
from autotune.search.confirmed import failures, judge
from autotune.trial.protocol import Outcome
from autotune.trial.record import TrialRecord
from tests.unit.report_studies import make_plan


def record(name: str, rate: float | None, *, peak: int = 100, **changes: object) -> TrialRecord:
    plan = replace(make_plan(), strategy=name).to_dict()
    values: dict[str, object] = {
        "launch": 1, "plan_id": plan["strategy"], "plan": plan, "message": "",
        "outcome": Outcome.OK if rate else Outcome.CRASHED, "tokens_per_s": rate,
        "step_s": 1000 / rate if rate else None, "peak_reserved_bytes": peak,
    }  # fmt: skip
    return TrialRecord(**(values | changes))  # type: ignore[arg-type]


def test_the_fastest_mean_wins_where_the_launches_tell_them_apart():
    runs = [record("a", 100.0), record("b", 120.0), record("a", 101.0), record("b", 121.0)]
    verdict = judge(runs, [record("b", 118.0)])
    assert verdict is not None and verdict.winner.plan_id == "b" and not verdict.ties
    assert verdict.winner.tokens_per_s == pytest.approx(120.5)
    assert verdict.winner.low < 120.5 < verdict.winner.high
    assert [other.plan_id for other in verdict.others] == ["a"]
    assert verdict.drift == pytest.approx(121 / 118 - 1)


def test_a_tie_goes_to_the_larger_headroom_and_is_named():
    runs = [record("a", 100.0, peak=50), record("b", 110.0), record("a", 112.0, peak=50),
            record("b", 103.0)]  # fmt: skip
    verdict = judge(runs, [])
    assert verdict is not None and verdict.winner.plan_id == "a"
    assert [tie.plan_id for tie in verdict.ties] == ["b"]
    assert "A tie with" in " ".join(verdict.sentences()) and verdict.drift is None


def test_what_too_few_launches_cannot_tell_apart_is_named_but_does_not_win():
    verdict = judge([record("a", 96.0, peak=50), record("b", 100.0)], [])
    assert verdict is not None and verdict.winner.plan_id == "b"
    assert [tie.plan_id for tie in verdict.ties] == ["a"]
    near = judge([record("a", 98.5, peak=50), record("b", 100.0)], [])
    assert near is not None and near.winner.plan_id == "a"


@pytest.mark.parametrize("outcome", [Outcome.THRASH, Outcome.OOM, Outcome.CRASHED])
def test_what_failed_once_never_wins(outcome: Outcome):
    bad = replace(record("a", 200.0), outcome=outcome, message="too near the limit")
    verdict = judge([record("a", 200.0), record("b", 100.0), bad, record("b", 99.0)], [])
    assert verdict is not None and verdict.winner.plan_id == "b"
    assert [failed.plan_id for failed in verdict.failed] == ["a"]
    assert "too near the limit" in " ".join(verdict.sentences())
    assert judge([bad], []) is None and set(failures([bad])) == {"a"}


def test_an_interrupted_launch_says_nothing():
    cut = replace(record("a", None), outcome=Outcome.INTERRUPTED)
    verdict = judge([record("a", 100.0), cut], [])
    assert verdict is not None and verdict.winner.launches == 1 and not verdict.failed
    assert judge([cut], []) is None


def test_finalists_are_those_whose_interval_reaches_the_best():
    close = record("close", 95.0, step_s_low=9.8, step_s_high=11.5)
    records = [
        record("far", 50.0),
        record("best", 100.0, step_s_low=9.8, step_s_high=10.3),
        close,
        record("broken", None),
        replace(record("thrash", 300.0), outcome=Outcome.THRASH),
    ]
    assert [r.plan_id for r in finalists_of(records, 3)] == ["best", "close"]
    assert [r.plan_id for r in finalists_of(records, 1)] == ["best"]
    assert finalists_of(records, 0) == [] and finalists_of([record("broken", None)], 3) == []
