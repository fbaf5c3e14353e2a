"""The bench of a real search: launches of real ranks, their folders and their records."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from autotune.errors import NothingFitsError
from autotune.planner import Estimate
from autotune.search.book import Book
from autotune.search.job import Job, rung_of
from autotune.search.space import Family
from autotune.trial.folder import numbered_launches
from autotune.trial.launch import Ended, Limits, run_launch
from autotune.trial.native_ops import build_native_ops
from autotune.trial.outcome import read_rungs
from autotune.trial.protocol import REQUEST_FILE, Outcome, Request, write_message
from autotune.trial.record import TrialRecord

LAUNCHES = "launches"
STUDY_VARIABLE = "AUTOTUNE_STUDY"


class LiveBench:
    """Opens launches in the study's folder.

    Args:
        folder: The study's.
        job: What every launch has in common.
        book: The study's families and records.
        note: Is told what the user should know.
        budget_ends: `time.monotonic()` at which the search's budget ends.
    """

    def __init__(
        self,
        folder: Path,
        job: Job,
        book: Book,
        note: Callable[[str], object],
        budget_ends: float | None,
    ) -> None:
        self.folder = folder
        self.job = job
        self.book = book
        self.note = note
        self.budget_ends = budget_ends
        self.data_said = False
        self._started = time.monotonic()

    @property
    def spent_s(self) -> float:
        """Wall clock since the search began."""
        return time.monotonic() - self._started

    @property
    def environment(self) -> dict[str, str]:
        """Variables of every rank: by them a later search finds what a killed one left."""
        return {STUDY_VARIABLE: str(self.folder.resolve())}

    def open(self, family: Family, planned: Sequence[Estimate]) -> LiveLaunch:
        """Make a launch's folder; its ranks start with its first rung."""
        number = next_launch(self.folder, self.book)
        folder = self.folder / LAUNCHES / f"{number:04d}-{family.name.replace(' ', '-')}"
        folder.mkdir(parents=True, exist_ok=True)
        return LiveLaunch(self, family, planned, number, folder)


class LiveLaunch:
    """One launch; its planned rungs are measured in one go when the first is asked for."""

    def __init__(
        self,
        bench: LiveBench,
        family: Family,
        planned: Sequence[Estimate],
        number: int,
        folder: Path,
    ) -> None:
        self.family = family
        self.number = number
        self.folder = folder
        self._bench = bench
        self._planned = list(planned)
        self._records: dict[int, TrialRecord] | None = None

    @property
    def alive(self) -> bool:
        """Whether more of what was planned can be had."""
        return self._records is None or bool(self._records)

    def measure(
        self, estimate: Estimate, *, give_up_step_s: float | None = None
    ) -> TrialRecord | None:
        """Return the record of a rung; see `autotune.search.bench.Launch`."""
        if self._records is None:
            self._records = {r.plan_object.micro_batch_size: r for r in self._run()}
        record = self._records.pop(estimate.plan.micro_batch_size, None)
        if record is None or record.outcome is not Outcome.OK:
            self._records = {}
        return record

    def close(self) -> None:
        """Nothing runs between rungs."""
        self._records = {}

    def _run(self) -> list[TrialRecord]:
        bench = self._bench
        rungs = [rung_of(estimate.plan) for estimate in self._planned]
        request = bench.job.request(self._planned[0].plan, rungs, self.folder)
        write_message(request, self.folder / REQUEST_FILE)
        limits = self._limits()
        notes: list[str] = []
        try:
            built_s = build_native_ops(
                request, self.folder, note=notes, environment=bench.environment
            )
            if built_s > 5:
                notes.append(f"built native operators in {built_s:.0f} s")
            limits = self._limits()  # what the build left of the budget
            ended = run_launch(request, self.folder, limits, environment=bench.environment)
        except NothingFitsError as error:  # no compiler: other families need none
            ended = _not_started(str(error))
        if ended.outcome is Outcome.TIMEOUT and self._cut_by_budget():
            ended = replace(ended, outcome=Outcome.INTERRUPTED, message="the time budget was spent")
        if not bench.data_said and ended.results and ended.results[0].data is not None:
            bench.data_said = True
            notes.append(f"data: {ended.results[0].data.words()}")
        for text in (*notes, *ended.notes):
            bench.note(text)
        return records_of(bench.folder, bench.book, self.family, request, ended, self.number)

    def _limits(self) -> Limits:
        return self._bench.job.limits(self.family, self._planned, self._bench.budget_ends)

    def _cut_by_budget(self) -> bool:
        ends = self._bench.budget_ends
        return ends is not None and time.monotonic() >= ends - 1.0


def records_of(
    study: Path, book: Book, family: Family, request: Request, ended: Ended, number: int
) -> list[TrialRecord]:
    """Return the records of a launch that ended, with what was predicted of them before it.

    What was interrupted says nothing of its plan and has none.
    """
    judged = book.judged(family)
    folder = Path(request.out_dir)
    return [
        _with_prediction(record, judged, number, folder, study, ended)
        for record in read_rungs(request, ended.results, ended.outcome, ended.message)
        if record.outcome is not Outcome.INTERRUPTED
    ]


def next_launch(study: Path, book: Book) -> int:
    """Return a number no launch had, also one whose folder was deleted since."""
    used = [number for number, _ in numbered_launches(study / LAUNCHES)]
    used += [record.launch for record in book.store.all()]
    return max(used, default=0) + 1


def _not_started(why: str) -> Ended:
    return Ended(outcome=Outcome.CRASHED, message=why, rank=None, exit_codes=[], elapsed_s=0.0)


def _with_prediction(
    record: TrialRecord, family: Family, number: int, folder: Path, study: Path, ended: Ended
) -> TrialRecord:
    estimate = family.rung(record.plan_object.micro_batch_size)
    low, high = estimate.peak.interval_bytes
    started = (folder / REQUEST_FILE).stat().st_mtime
    return replace(
        record,
        launch=number,
        predicted_bytes=estimate.peak.expected_bytes,
        predicted_low_bytes=low,
        predicted_high_bytes=high,
        predicted_fit_probability=estimate.fit_probability,
        predicted_step_s=estimate.time.step_s,
        predicted_tokens_per_s=estimate.time.tokens_per_s,
        predicted_verdict=str(estimate.verdict),
        launch_s=ended.elapsed_s or None,
        started_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        log_dir=str(folder.relative_to(study)),
    )
