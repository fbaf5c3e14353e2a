"""The bench of a real search: launches of real ranks, their folders and their records."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from autotune.errors import NothingFitsError
from autotune.plan import Plan
from autotune.planner import Estimate
from autotune.search.book import Book
from autotune.search.job import Job, rung_of
from autotune.search.space import Family
from autotune.trial.conversation import ConversationalLaunch
from autotune.trial.folder import LAUNCHES, numbered_launches, read_results
from autotune.trial.launch import Ended
from autotune.trial.native_ops import build_native_ops
from autotune.trial.outcome import read_rungs
from autotune.trial.protocol import REQUEST_FILE, Outcome, Request, write_message
from autotune.trial.ranks import Starter
from autotune.trial.record import TrialRecord

STUDY_VARIABLE = "AUTOTUNE_STUDY"
_NUMBERING = threading.Lock()


class LiveBench:
    """Opens launches in the study's folder.

    Close it: it holds the process that ranks are forked from.

    Args:
        folder: The study's.
        job: What every launch has in common.
        book: The study's families and records.
        note: Is told what the user should know.
        budget_ends: `time.monotonic()` at which the search's budget ends.
        starter: What starts the ranks; None starts each cold.
        variables: More of the ranks' environment.
    """

    def __init__(
        self,
        folder: Path,
        job: Job,
        book: Book,
        note: Callable[[str], object],
        budget_ends: float | None,
        starter: Starter | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self._variables = dict(variables or {})
        self._open: LiveLaunch | None = None
        self.folder = folder
        self.job = job
        self.book = book
        self.note = note
        self.budget_ends = budget_ends
        self.starter = starter
        self.data_said = False
        self._started = time.monotonic()

    @property
    def spent_s(self) -> float:
        """Wall clock since the search began."""
        return time.monotonic() - self._started

    @property
    def environment(self) -> dict[str, str]:
        """Variables of every rank: by them a later search finds what a killed one left."""
        return {**self._variables, STUDY_VARIABLE: str(self.folder.resolve())}

    def open(self, family: Family, planned: Sequence[Estimate]) -> LiveLaunch:
        """Make a launch's folder and start its ranks, which wait for their first rung."""
        with _NUMBERING:
            number = next_launch(self.folder, self.book)
            folder = self.folder / LAUNCHES / f"{number:04d}-{family.name.replace(' ', '-')}"
            folder.mkdir(parents=True, exist_ok=True)
        self._open = LiveLaunch(self, family, planned[0].plan, number, folder)
        return self._open

    def stop(self) -> None:
        """End the launch under way at once, from another thread than its own."""
        if self._open is not None:
            self._open.stop()


class LiveLaunch:
    """One start of all ranks, which measures what it is asked until it is closed."""

    def __init__(
        self, bench: LiveBench, family: Family, first: Plan, number: int, folder: Path
    ) -> None:
        self.family = family
        self.number = number
        self._bench = bench
        self._folder = folder
        self._begun = time.monotonic()
        self._first = True
        self._longest_rung_s = 0.0
        """Of what it measured so far: the next takes about as long."""
        self._request = bench.job.request(first, [], folder)
        self._refused = ""
        self._launch: ConversationalLaunch | None = None
        # Before anything is built, so that what a killed search leaves can be told apart.
        write_message(self._request, folder / REQUEST_FILE)
        try:
            self._build()
        except NothingFitsError as error:  # no compiler: other families need none
            self._refused = str(error)
            return
        self._launch = ConversationalLaunch(
            self._request,
            folder,
            bench.job.limits(family, [], None),
            starter=bench.starter,
            environment=bench.environment,
        )

    @property
    def alive(self) -> bool:
        """Whether it can still be asked; not where `--trial-timeout` leaves no time for a rung."""
        if self._launch is None or not self._launch.alive:
            return False
        limit_s = self._bench.job.trial_timeout_s
        left_s = None if limit_s is None else limit_s - (time.monotonic() - self._begun)
        return left_s is None or self._first or left_s > self._longest_rung_s

    def measure(
        self, estimate: Estimate, *, give_up_step_s: float | None = None
    ) -> TrialRecord | None:
        """Return the record of a rung; see `autotune.search.bench.Launch`."""
        if self._launch is None:
            return self._told(_refusal(estimate.plan, self._refused))
        asked = time.monotonic()
        with ExitStack() as cut_off:
            # On Ctrl-C, or the user's mistake: no rank goes on for it.
            cut_off.callback(self._launch.close, at_once=True)
            record = self._launch.measure(
                rung_of(estimate.plan),
                give_up_step_s=give_up_step_s,
                deadline_s=self._deadline_s(estimate),
            )
            cut_off.pop_all()
        self._first = False
        self._longest_rung_s = max(self._longest_rung_s, time.monotonic() - asked)
        if record.outcome is Outcome.TIMEOUT and cut_by_budget(self._bench.budget_ends):
            return None
        self._say_data()
        return self._told(record)

    def close(self) -> None:
        """End the ranks, and pass on what they noted."""
        if self._launch is None:
            return
        for text in self._launch.close().notes:
            self._bench.note(text)

    def stop(self) -> None:
        """End the ranks at once; a rung under way says nothing then."""
        if self._launch is not None:
            self._launch.close(at_once=True)

    def _build(self) -> None:
        notes: list[str] = []
        built_s = build_native_ops(
            self._request, self._folder, note=notes, environment=self._bench.environment
        )
        if built_s > 5:
            notes.append(f"built native operators in {built_s:.0f} s")
        for text in notes:
            self._bench.note(text)

    def _deadline_s(self, estimate: Estimate) -> float:
        """Return the seconds this rung may take, the start of the launch included for its first."""
        job, ends = self._bench.job, self._bench.budget_ends
        if job.trial_timeout_s is not None:
            allowed = job.trial_timeout_s - (time.monotonic() - self._begun)
        else:
            allowed = job.rung_limit_s(estimate) + (job.start_s if self._first else 0.0)
        if ends is not None:
            allowed = min(allowed, ends - time.monotonic())
        return max(1.0, allowed)

    def _say_data(self) -> None:
        if self._bench.data_said:
            return
        counts = read_results(self._folder)[0].data
        if counts is not None:
            self._bench.data_said = True
            self._bench.note(f"data: {counts.words()}")

    def _told(self, record: TrialRecord) -> TrialRecord:
        judged = self._bench.book.judged(self.family)
        took_s = time.monotonic() - self._begun
        return with_prediction(
            record, judged, self.number, self._folder, self._bench.folder, took_s
        )


def records_of(
    study: Path, book: Book, family: Family, request: Request, ended: Ended, number: int
) -> list[TrialRecord]:
    """Return the records of a launch that ended, with what was predicted of them before it.

    What was interrupted says nothing of its plan and has none.
    """
    judged = book.judged(family)
    folder = Path(request.out_dir)
    return [
        with_prediction(record, judged, number, folder, study, ended.elapsed_s)
        for record in read_rungs(request, ended.results, ended.outcome, ended.message)
        if record.outcome is not Outcome.INTERRUPTED
    ]


def next_launch(study: Path, book: Book) -> int:
    """Return a number no launch had, also one whose folder was deleted since."""
    used = [number for number, _ in numbered_launches(study / LAUNCHES)]
    used += [record.launch for record in book.store.all()]
    return max(used, default=0) + 1


def _refusal(plan: Plan, why: str) -> TrialRecord:
    """Return the record of a plan whose launch could not be started."""
    return TrialRecord(
        launch=0, plan_id=plan.id, plan=plan.to_dict(), outcome=Outcome.CRASHED, message=why
    )


def with_prediction(
    record: TrialRecord, family: Family, number: int, folder: Path, study: Path, took_s: float
) -> TrialRecord:
    """Return a record with its launch, and with what was predicted of it before.

    Args:
        record: What was measured.
        family: Its family, as it was judged then.
        number: Of the launch.
        folder: Of the launch.
        study: Folder of the study.
        took_s: Seconds of the launch up to now.
    """
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
        launch_s=took_s or None,
        started_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        log_dir=str(folder.relative_to(study)),
    )


def cut_by_budget(budget_ends: float | None) -> bool:
    """Say whether the search's budget, not its own limit, has ended a launch just now."""
    return budget_ends is not None and time.monotonic() >= budget_ends - 1.0
