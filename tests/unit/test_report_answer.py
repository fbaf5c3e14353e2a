"""Who won, by how much, and what ties."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autotune.report.answer import advise, explain, find_answer, pareto_front, standings
from autotune.report.study import load_study
from autotune.trial.protocol import Outcome
from tests.unit.report_studies import (
    ended_summary,
    make_failure,
    make_plan,
    make_record,
    write_study,
)


def _study(tmp_path, records, **changes):
    return load_study(write_study(tmp_path, records, **changes))


def test_clear_win_is_told_against_the_noise(tmp_path):
    fast = make_record(make_plan("zero2"), step_s=2.0, noise=0.01)
    slow = make_record(make_plan("zero3"), step_s=2.5, noise=0.01)
    answer = find_answer(_study(tmp_path, [slow, fast]))
    assert answer.winner == fast and answer.is_final
    assert answer.rivals[0].lead == pytest.approx(0.25)
    assert answer.rivals[0].noise == pytest.approx(0.01 * 2**0.5)
    assert not answer.ties
    text = " ".join(explain(answer))
    assert "25% faster than the next best, zero3" in text
    assert "17.7 times the noise of 1.4%" in text
    assert "two launches of one plan can differ by more" in text


@pytest.mark.parametrize(("step_s", "ties"), [(2.02, 1), (2.06, 0)])
def test_tie_is_decided_by_both_intervals(tmp_path, step_s, ties):
    fast = make_record(make_plan("zero2"), step_s=2.0, noise=0.01)
    other = make_record(make_plan("zero3"), step_s=step_s, noise=0.01)
    answer = find_answer(_study(tmp_path, [fast, other]))
    assert len(answer.ties) == ties
    assert ("a tie" in explain(answer)[0]) == bool(ties)


def test_spread_between_launches_widens_the_noise(tmp_path):
    plan = make_plan("zero2")
    first = make_record(plan, step_s=2.0, noise=0.001)
    again = make_record(plan, step_s=2.2, noise=0.001, launch=2)
    other = make_record(make_plan("zero3"), step_s=2.25, noise=0.001)
    answer = find_answer(_study(tmp_path, [first, again, other]))
    assert answer.launch_spread == pytest.approx((1 / 2.0 - 1 / 2.2) / ((1 / 2.0 + 1 / 2.2) / 2))
    assert answer.rivals[0].is_tie


def test_composed_and_measured_steps_are_not_one_spread(tmp_path):
    plan = make_plan("zero2")
    composed = make_record(plan, step_s=2.0, measured_accum_steps=(1, 2))
    measured = make_record(plan, step_s=2.4, launch=2)
    assert find_answer(_study(tmp_path, [composed, measured])).launch_spread is None


def test_missing_interval_makes_no_tie_and_says_so(tmp_path):
    fast = make_record(make_plan("zero2"), step_s=2.0, step_s_low=None, step_s_high=None)
    other = make_record(make_plan("zero3"), step_s=2.0)
    answer = find_answer(_study(tmp_path, [fast, other]))
    assert not answer.ties
    assert "noise of the two was not measured" in explain(answer)[0]


def test_plan_that_failed_its_confirmation_is_out(tmp_path):
    plan = make_plan("zero2")
    records = [
        make_record(plan, step_s=1.0),
        make_record(make_plan("zero3"), step_s=2.0),
        make_failure(plan, launch=2),
    ]
    assert [r.plan["strategy"] for r in standings(records)] == ["zero3"]
    assert find_answer(_study(tmp_path, records, summary={})).winner == records[1]


def test_interrupted_second_launch_takes_nothing_away():
    plan = make_plan("zero2")
    records = [make_record(plan), make_failure(plan, Outcome.INTERRUPTED, "ctrl-c", launch=2)]
    assert standings(records) == records[:1]


def test_thrash_never_wins(tmp_path):
    near = make_record(make_plan("zero2"), step_s=1.0, outcome=Outcome.THRASH)
    other = make_record(make_plan("zero3"), step_s=2.0)
    assert find_answer(_study(tmp_path, [near, other])).winner == other
    assert find_answer(_study(tmp_path / "running", [near, other], summary={})).winner == other


def test_search_that_has_ended_says_who_won(tmp_path):
    """It may prefer the one with more memory left among ties; its figures are best.yml's."""
    fast = make_record(make_plan("zero2"), step_s=2.0, peak_reserved_bytes=600 * 2**20)
    small = make_record(make_plan("zero3"), step_s=2.01, peak_reserved_bytes=400 * 2**20)
    summary = ended_summary([fast, small])
    summary["best"] = {"plan_id": small.plan_id, "measured": {"tokens_per_s": 16_250.0}}
    answer = find_answer(_study(tmp_path, [fast, small], summary=summary))
    assert answer.winner == replace(small, tokens_per_s=16_250.0)
    text = " ".join(explain(answer))
    assert "slower than the fastest, zero2" in text and "a tie" in text
    assert "leaves more memory free: it took 400.0 MiB a rank" in text


def test_summary_older_than_the_records_does_not_choose(tmp_path):
    """A search killed between a record and the next summary leaves this."""
    slow = make_record(make_plan("zero2"), launch=1)
    fast = make_record(make_plan("zero3"), step_s=1.9, launch=2)
    summary = ended_summary([slow]) | {"launches": 1}
    answer = find_answer(_study(tmp_path, [slow, fast], summary=summary))
    assert answer.winner == fast and not answer.is_final


@pytest.mark.parametrize("reason", ["still running", "interrupted", ""])
def test_search_that_has_not_ended_still_agrees_with_its_best_yml(tmp_path, reason):
    fast = make_record(make_plan("zero2"), step_s=2.0)
    small = make_record(make_plan("zero3"), step_s=2.01)
    summary = ended_summary([small]) | {"stopped_because": reason}
    answer = find_answer(_study(tmp_path, [fast, small], summary=summary))
    assert answer.winner is not None and answer.winner.plan_id == small.plan_id
    assert not answer.is_final


def test_summary_naming_an_unmeasured_plan_is_remarked(tmp_path):
    records = [make_record(make_plan("zero2")), make_record(make_plan("zero3"), step_s=3.0)]
    summary = ended_summary(records) | {"best": {"plan_id": "feedbeef0000"}}
    answer = find_answer(_study(tmp_path, records, summary=summary))
    assert answer.winner == records[0]
    assert "feedbeef0000" in explain(answer)[-1]


def test_pareto_front_has_no_beaten_point():
    def at(step_s, mib, micro):
        return make_record(make_plan("zero2", micro), step_s=step_s, peak_reserved_bytes=mib << 20)

    best, small = at(1.0, 500, 1), at(2, 100, 2)
    beaten, same_memory, same_speed = at(3, 300, 4), at(2, 500, 8), at(2, 200, 16)
    assert pareto_front([beaten, best, same_memory, same_speed, small]) == [small, best]


def test_advice_depends_on_what_failed(tmp_path):
    failures = [
        make_failure(make_plan("zero1")),
        make_failure(make_plan("zero2")),
        make_failure(make_plan("zero3"), Outcome.HANG, "rank 1 stopped"),
    ]
    study = _study(tmp_path, failures)
    assert find_answer(study).winner is None
    lines = advise(study)
    assert lines[0].startswith("2 x out of memory: Raise --memory-limit")
    assert lines[1].startswith("1 x hung")
    assert "All 3 plans were refused" in advise(_study(tmp_path, []))[0]
    assert "No trial has ended" in advise(_study(tmp_path, [], summary={"best": None}))[0]
