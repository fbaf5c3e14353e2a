"""Which launches confirm the finalists, in which order, and what they are asked to do."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autotune.plan import Plan
from autotune.search import confirm, live
from autotune.search.book import Book
from autotune.search.confirm import ROUNDS, Confirmer, confirmations_in
from autotune.trial.launch import Ended
from autotune.trial.protocol import (
    REQUEST_FILE,
    Measurement,
    Outcome,
    RankResult,
    Request,
    write_message,
)
from autotune.trial.ranks import ColdStarter
from autotune.trial.record import TrialRecord
from tests.unit.search_launches import measured, two_families

LAUNCH_S = 10.0


class Store:
    def __init__(self, *records: TrialRecord) -> None:
        self._records = list(records)

    def get(self, plan_id: str) -> TrialRecord | None:
        return next((r for r in self._records if r.plan_id == plan_id), None)

    def all(self) -> list[TrialRecord]:
        return self._records

    def add(self, records: Any) -> list[TrialRecord]:
        raise AssertionError("confirmations are kept apart from what chose the finalists")


class Said:
    def __init__(self) -> None:
        self.notes: list[str] = []

    def launch_started(self, n: int, description: str) -> None: ...
    def launch_done(self, n: int) -> None: ...
    def note(self, text: str) -> None:
        self.notes.append(text)


class Study:
    """A study of two families and 64 sequences a step, whose launches end as `outcome` says."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.families, self._job = two_families(global_batch_size=64)
        self.rungs = [family.ladder[0].plan for family in self.families]
        self.next = [family.ladder[1].plan for family in self.families]
        self.requests: list[Request] = []
        self.outcome: Callable[[Plan], Outcome] = lambda plan: Outcome.OK
        self.said = Said()
        self.now = 1000.0
        clock = SimpleNamespace(
            monotonic=lambda: self.now, strftime=time.strftime, gmtime=time.gmtime
        )
        monkeypatch.setattr(confirm, "time", clock)
        monkeypatch.setattr(live, "time", clock)
        monkeypatch.setattr(confirm, "run_launch", self._run_launch)
        self.built: set[Path] = set()
        monkeypatch.setattr(confirm, "build_native_ops", self._build)

    @property
    def launched(self) -> list[Plan]:
        return [request.plan_object() for request in self.requests]

    def confirm(self, *rates: tuple[Plan, float], budget_ends: float | None = None) -> list[Any]:
        store = Store(*(found(plan, rate) for plan, rate in rates))
        book = Book(self.families, store, None)
        confirmer = Confirmer(self.folder, self._job, book, self.said, ColdStarter())
        return confirmer.run(2, budget_ends)

    def _build(self, request: Request, folder: Path, **more: Any) -> float:
        self.built.add(folder)
        return 0.0

    def _run_launch(self, request: Request, folder: Path, limits: Any, **more: Any) -> Ended:
        assert folder in self.built, "no deadline runs while operators are built"
        self.requests.append(request)
        self.now += LAUNCH_S
        write_message(request, folder / REQUEST_FILE)
        outcome = self.outcome(request.plan_object())
        rungs = [measured(rung) for rung in request.rungs] if outcome is Outcome.OK else []
        results = [
            RankResult(
                launch_id=request.launch_id, rank=rank, world_size=2, complete=True, rungs=rungs
            )
            for rank in (0, 1)
        ]
        return Ended(
            outcome=outcome, message="", rank=None, exit_codes=[0, 0], elapsed_s=1, results=results
        )


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    return Study(tmp_path, monkeypatch)


def found(plan: Plan, rate: float) -> TrialRecord:
    return TrialRecord(
        launch=1, plan_id=plan.id, plan=plan.to_dict(), outcome=Outcome.OK, message="",
        tokens_per_s=rate, step_s=1.0, step_s_low=0.99, step_s_high=1.01,
    )  # fmt: skip


def test_finalists_are_measured_in_turns_as_a_full_run_would_run_them(study: Study) -> None:
    one, other = study.rungs
    done = study.confirm((one, 100.0), (other, 101.0))
    assert study.launched == [other, one] * ROUNDS
    assert [record.plan_id for record in done] == [plan.id for plan in study.launched]
    assert confirmations_in(study.folder) == done
    for request in study.requests:
        plan = request.plan_object()
        assert request.rehearses, "with an evaluation, a checkpoint and full rows"
        assert plan.grad_accum_steps > Measurement().max_direct_accumulation
        assert request.measurement.max_direct_accumulation >= plan.grad_accum_steps
        assert [rung.micro_batch_size for rung in request.rungs] == [plan.micro_batch_size]


def test_who_failed_is_not_launched_again(study: Study) -> None:
    one, other = study.rungs
    study.outcome = lambda plan: Outcome.OOM if plan == other else Outcome.OK
    done = study.confirm((one, 100.0), (other, 101.0))
    assert study.launched == [other, one, one]
    assert [record.outcome for record in done] == [Outcome.OOM, Outcome.OK, Outcome.OK]


def test_where_all_failed_the_next_fastest_are_to_hold(study: Study) -> None:
    study.outcome = lambda plan: Outcome.CRASHED if plan in study.rungs else Outcome.OK
    one, other = study.rungs
    done = study.confirm((one, 101.0), (other, 100.0), (study.next[0], 50.0))
    assert study.launched == [one, other, *[study.next[0]] * ROUNDS]
    assert [record.outcome for record in done[-ROUNDS:]] == [Outcome.OK] * ROUNDS


def test_a_resumed_confirmation_goes_on_with_what_it_lacks(study: Study) -> None:
    one, other = study.rungs
    done = study.confirm((one, 100.0), (other, 101.0))
    lines = (study.folder / confirm.CONFIRMATIONS_FILE).read_text().splitlines(keepends=True)
    (study.folder / confirm.CONFIRMATIONS_FILE).write_text("".join(lines[:3]) + lines[3][:40])
    study.requests.clear()
    again = study.confirm((one, 100.0), (other, 101.0))
    assert study.launched == [one]
    assert [record.plan_id for record in again] == [record.plan_id for record in done]
    assert confirmations_in(study.folder) == again


def test_the_budget_ends_it_and_what_it_cuts_says_nothing(study: Study) -> None:
    study.outcome = lambda plan: Outcome.TIMEOUT
    rates = [(plan, 100.0) for plan in study.rungs]
    assert study.confirm(*rates, budget_ends=study.now - 1) == []
    assert not study.launched and "time budget" in study.said.notes[0]
    assert study.confirm(*rates, budget_ends=study.now + LAUNCH_S) == []
    assert len(study.launched) == 1
    slow = study.confirm(*rates, budget_ends=study.now + 60 * LAUNCH_S)
    assert {record.outcome for record in slow} == {Outcome.TIMEOUT}
