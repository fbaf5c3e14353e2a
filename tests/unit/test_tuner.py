"""The search loop where no rank can be started."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from autotune.errors import NothingFitsError
from autotune.plan import Plan
from autotune.search.book import Book
from autotune.trial.protocol import Outcome, Request, Rung
from autotune.trial.record import TrialRecord
from tests.unit.search_launches import FakeLaunch, two_families


class Silent:
    def start(self, *args, **kwargs) -> None:
        self.started = kwargs

    def launch_started(self, n: int, description: str) -> None: ...
    def rung_done(self, record: TrialRecord) -> None: ...
    def launch_done(self, n: int) -> None: ...
    def note(self, text: str) -> None: ...
    def stop(self) -> None: ...


def make_tuner(folder: Path, learner=None, sampler: str = "grid"):
    """A search of two families, ZeRO-2 and ZeRO-3, in this order."""
    from autotune.search import tuner

    families, job = two_families()
    return tuner.Tuner(folder, families, job, Silent(), learner, sampler=sampler)


def test_a_failed_native_build_ends_its_family_and_not_the_search(tmp_path: Path, monkeypatch):
    pytest.importorskip("optuna")
    from autotune.search import live

    def no_compiler(*args, **kwargs):
        raise NothingFitsError("could not be built: g++ not found")

    monkeypatch.setattr(live, "build_native_ops", no_compiler)
    search = make_tuner(tmp_path)
    stopped = search.run(max_launches=None, budget_s=None, after_launch=lambda now: None)
    assert search._progress.started["launches_left"] == 2
    assert search._launches_left(None) == 0
    records = search.records
    assert stopped.because == "every configuration of the space was tried"
    assert [record.outcome for record in records] == [Outcome.CRASHED] * 2
    assert {record.plan["strategy"] for record in records} == {"zero2", "zero3"}
    assert "g++ not found" in records[0].message


def test_launch_numbers_are_the_folders_own_and_are_never_given_twice(tmp_path: Path, monkeypatch):
    """Launch 1 was deleted by hand; what 2 measured is its own, and the next one is 3."""
    pytest.importorskip("optuna")
    from autotune.search import live

    launches = tmp_path / live.LAUNCHES
    monkeypatch.setattr(live, "build_native_ops", lambda *args, **kwargs: 0.0)

    class Interrupted(FakeLaunch):
        """Ctrl-C comes when every rank has answered, before the search has seen it."""

        def measure(self, rung: Rung, **kwargs):
            super().measure(rung)
            raise KeyboardInterrupt

    monkeypatch.setattr(live, "ConversationalLaunch", Interrupted)
    stopped = make_tuner(tmp_path).run(max_launches=None, budget_s=None, after_launch=print)
    assert stopped.interrupted
    (first,) = launches.iterdir()
    first.rename(launches / first.name.replace("0001", "0002"))
    (tmp_path / "trials.jsonl").unlink()
    search = make_tuner(tmp_path)
    search.run(max_launches=None, budget_s=None, after_launch=print)
    assert [record.launch for record in search.records] == [2, 3]
    assert sorted(path.name[:4] for path in launches.iterdir()) == ["0002", "0003"]
    for folder in launches.iterdir():
        shutil.rmtree(folder)
    make_tuner(tmp_path).run(max_launches=None, budget_s=None, after_launch=print)
    assert [path.name[:4] for path in launches.iterdir()] == ["0004"], "records know 3"


class Ruled:
    """Learns from the first trial of ZeRO-2 that nothing of ZeRO-3 fits, and few of ZeRO-2."""

    def __init__(self) -> None:
        self.learned = []

    def learn(self, family, records) -> None:
        self.learned += [(family.name, record.outcome) for record in records]

    def log_correction(self, families):
        return {}

    def judged(self, family):
        if not self.learned:
            return family
        first = 0 if family.name == "zero3" else 1
        ladder = [
            replace(e, fit_probability=e.fit_probability if n < first else 0.0)
            for n, e in enumerate(family.ladder)
        ]
        return replace(family, ladder=tuple(ladder))


def test_what_trials_rule_out_is_not_launched_and_named(tmp_path: Path, monkeypatch):
    pytest.importorskip("optuna")
    from autotune.search import live

    launched = []

    class Noted(FakeLaunch):
        def __init__(self, request: Request, *args, **kwargs) -> None:
            launched.append(request.plan["strategy"])
            super().__init__(request, *args, **kwargs)

    monkeypatch.setattr(live, "build_native_ops", lambda *args, **kwargs: 0.0)
    monkeypatch.setattr(live, "ConversationalLaunch", Noted)
    ruled = Ruled()
    search = make_tuner(tmp_path, ruled)
    search.run(max_launches=None, budget_s=None, after_launch=lambda now: None)
    assert launched == ["zero2"] and ruled.learned[0] == ("zero2", Outcome.OK)
    measured = {record.plan_id for record in search.records}
    left_out = [Plan.from_dict(entry["plan"]) for entry in search.left_out()]
    assert {plan.strategy for plan in left_out} >= {"zero3"}
    assert not measured & {plan.id for plan in left_out}
    assert {entry["code"] for entry in search.left_out()} == {"PREDICTED_OOM"}
    again = make_tuner(tmp_path, other := Ruled())
    again.run(max_launches=None, budget_s=None, after_launch=lambda now: None)
    assert ("zero2", Outcome.OK) in other.learned, "a resumed study learns from its records"
    assert launched == ["zero2"]
    record = search.records[0]
    assert record.predicted_low_bytes < record.predicted_bytes < record.predicted_high_bytes
    assert 0 < record.predicted_fit_probability <= 1


def record_of(seconds: float) -> TrialRecord:
    return TrialRecord(
        launch=1, plan_id="one", plan={}, outcome=Outcome.OK, message="", launch_s=seconds
    )


@pytest.mark.parametrize(
    ("launch_s", "confirming", "ends_after_s"),
    [
        (2.0, 4, 92.0),  # what four such launches take is left for them
        (60.0, 4, 75.0),  # but no more than a quarter of the budget
        (2.0, 0, 100.0),  # nothing will be confirmed
        (None, 4, 100.0),  # nothing is known of how long a launch takes
    ],
)
def test_the_budget_leaves_time_to_confirm(monkeypatch, launch_s, confirming, ends_after_s):
    pytest.importorskip("optuna")
    from autotune.search import tuner
    from tests.unit.search_bench import MemoryStore

    book = Book([], MemoryStore(), None)
    book.store.add([record_of(launch_s)])
    now = 1000.0
    monkeypatch.setattr(tuner, "time", SimpleNamespace(monotonic=lambda: now))
    limits = tuner._Limits(book, now, None, 100.0, confirming)
    now += ends_after_s - 0.5
    assert limits.time_spent() is None
    now += 1.0
    assert "--budget" in (limits.time_spent() or "")


class TimesOut(FakeLaunch):
    def measure(self, rung: Rung, **kwargs) -> TrialRecord:
        self.alive = False
        return replace(super().measure(rung), outcome=Outcome.TIMEOUT)


def test_what_the_budget_cuts_says_nothing_of_its_plan(tmp_path: Path, monkeypatch):
    """A rung that its own limit ends is a timeout; one that the budget ends may be fast."""
    pytest.importorskip("optuna")
    from autotune.search import live
    from tests.unit.search_bench import MemoryStore

    monkeypatch.setattr(live, "build_native_ops", lambda *args, **kwargs: 0.0)
    monkeypatch.setattr(live, "ConversationalLaunch", TimesOut)
    (family, _), job = two_families()
    for left_s, outcome in ((0.5, None), (600.0, Outcome.TIMEOUT), (None, Outcome.TIMEOUT)):
        ends = None if left_s is None else time.monotonic() + left_s
        bench = live.LiveBench(tmp_path, job, Book([family], MemoryStore(), None), print, ends)
        record = bench.open(family, family.ladder).measure(family.ladder[0])
        assert (record and record.outcome) == outcome
