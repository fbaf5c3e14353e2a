"""Measure the finalists again: freshly forked, one plan a launch, in turns A B A B.

What the search reports for its winner is then what a run of its own gave, not a rung of a ladder,
and the best of many noisy measurements is not taken at its luckiest. Confirmations have a file of
their own: they are never mixed with the records that chose the finalists.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from autotune.search.book import Book
from autotune.search.confirmed import failures
from autotune.search.job import Job, rung_of
from autotune.search.live import (
    STUDY_VARIABLE,
    cut_by_budget,
    next_launch,
    records_of,
)
from autotune.trial.folder import LAUNCHES
from autotune.trial.launch import run_launch
from autotune.trial.native_ops import build_native_ops
from autotune.trial.protocol import Outcome
from autotune.trial.ranks import Starter
from autotune.trial.record import TrialRecord
from autotune.trial.store import read_records

CONFIRMATIONS_FILE = "confirmations.jsonl"
ROUNDS = 2
LAUNCH_NOISE = 0.02
"""Launches of one plan differ by this, which the interval of one launch does not show."""
_ALL_DIRECT = 10**6
"""Accumulations are measured as they are, however large."""


class Progress(Protocol):
    """Where it says what it does."""

    def launch_started(self, n: int, description: str) -> None: ...  # noqa: D102
    def launch_done(self, n: int) -> None: ...  # noqa: D102
    def note(self, text: str) -> None: ...  # noqa: D102


def finalists_of(records: Sequence[TrialRecord], most: int) -> list[TrialRecord]:
    """Return the fastest record and those whose interval reaches its, at most so many."""
    ran = [r for r in records if r.outcome is Outcome.OK and r.tokens_per_s and r.step_s]
    ran.sort(key=lambda record: -(record.tokens_per_s or 0.0))
    if not ran or most < 1:
        return []
    reach = _bounds(ran[0])[0]
    return [record for record in ran if _bounds(record)[1] >= reach][:most]


def _bounds(record: TrialRecord) -> tuple[float, float]:
    """Return what its tokens/s may be, the spread between launches included."""
    rate, step_s = record.tokens_per_s or 0.0, record.step_s or 1.0
    slowest = max(record.step_s_high or step_s, step_s) / step_s - 1
    fastest = 1 - min(record.step_s_low or step_s, step_s) / step_s
    low = (slowest**2 + LAUNCH_NOISE**2) ** 0.5
    high = (fastest**2 + LAUNCH_NOISE**2) ** 0.5
    return rate / (1 + low), rate * (1 + high)


def confirmations_in(folder: Path) -> list[TrialRecord]:
    """Return the confirmations of a study, in order."""
    return read_records(folder / CONFIRMATIONS_FILE)


class Confirmer:
    """Runs the confirming launches of a study that are missing."""

    def __init__(
        self, folder: Path, job: Job, book: Book, progress: Progress, starter: Starter
    ) -> None:
        self._folder = folder
        self._starter = starter
        self._job = job
        self._book = book
        self._progress = progress

    def run(self, most: int, budget_ends: float | None) -> list[TrialRecord]:
        """Confirm up to `most` finalists in turns; return every confirmation of the study.

        A resumed study goes on with the launches it lacks. The budget ends it between launches.
        """
        done = confirmations_in(self._folder)
        while True:
            failed = set(failures(done))
            records = [r for r in self._book.store.all() if r.plan_id not in failed]
            finalists = finalists_of(records, most)
            known = len(done)
            if not finalists or not self._in_turns(finalists, done, budget_ends):
                return done
            held = {record.plan_id for record in done} - set(failures(done))
            # Where all of them failed, the next fastest are to hold.
            if len(done) == known or held & {finalist.plan_id for finalist in finalists}:
                return done

    def _in_turns(
        self, finalists: Sequence[TrialRecord], done: list[TrialRecord], budget_ends: float | None
    ) -> bool:
        """Add the launches that are missing; return False where the budget ended it."""
        for turn in range(ROUNDS):
            for finalist in finalists:
                own = [record for record in done if record.plan_id == finalist.plan_id]
                failed = any(record.outcome is not Outcome.OK for record in own)
                if len(own) > turn or failed:
                    continue
                if budget_ends is not None and time.monotonic() >= budget_ends:
                    self._progress.note("the time budget ended the confirmation of the finalists")
                    return False
                found = self._launch(finalist, turn, budget_ends)
                self._append(found)
                done += found
        return True

    def _launch(
        self, finalist: TrialRecord, turn: int, budget_ends: float | None
    ) -> list[TrialRecord]:
        family = self._book.family_of(finalist)
        assert family is not None
        plan = finalist.plan_object
        number = next_launch(self._folder, self._book)
        name = f"{number:04d}-confirm-{family.name.replace(' ', '-')}"
        folder = self._folder / LAUNCHES / name
        folder.mkdir(parents=True)
        request = self._job.request(plan, [rung_of(plan)], folder)
        direct = request.measurement.model_copy(update={"max_direct_accumulation": _ALL_DIRECT})
        request = request.model_copy(update={"measurement": direct, "rehearses": True})
        self._progress.launch_started(
            number, f"confirming {plan.describe()}, {turn + 1} of {ROUNDS}"
        )
        limits = self._job.confirming_limits(family, finalist, budget_ends)
        tag = {STUDY_VARIABLE: str(self._folder.resolve())}
        build_native_ops(request, folder, environment=tag)  # no deadline runs while they build
        ended = run_launch(request, folder, limits, environment=tag, starter=self._starter)
        for text in ended.notes:
            self._progress.note(text)
        self._progress.launch_done(number)
        if ended.outcome is Outcome.TIMEOUT and cut_by_budget(budget_ends):
            return []
        return records_of(self._folder, self._book, family, request, ended, number)

    def _append(self, records: Sequence[TrialRecord]) -> None:
        path = self._folder / CONFIRMATIONS_FILE
        if path.exists():  # a killed search may have left half a line
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
        with path.open("a") as file:
            file.writelines(json.dumps(record.to_dict()) + "\n" for record in records)
            file.flush()
            os.fsync(file.fileno())
