"""A search on real ranks: recovers what is on disk, runs the loop, says how it ended."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from autotune.search.asker import Asker, journal_of
from autotune.search.bench import Launch
from autotune.search.book import Book
from autotune.search.confirm import ROUNDS, Confirmer
from autotune.search.job import Job
from autotune.search.learning import Learner
from autotune.search.live import LiveBench, LiveLaunch
from autotune.search.loop import Loop
from autotune.search.names import DEFAULT_SAMPLER, TOLERANCE
from autotune.search.parallel import Desk, Pinned, Slot, run_side_by_side
from autotune.search.policy import Asked
from autotune.search.recovery import keep_finished, kill_left_ranks
from autotune.search.samplers import make_sampler
from autotune.search.space import Family
from autotune.trial.folder import LAUNCHES, numbered_launches
from autotune.trial.forkserver import ForkServer
from autotune.trial.nodes.leader import Leader
from autotune.trial.ranks import Starter
from autotune.trial.record import TrialRecord
from autotune.trial.store import RecordStore

_CONFIRMING_SHARE = 0.25
"""Of a time budget, what confirming the finalists may take at most."""


class Progress(Protocol):
    """Where the search says what it does; see `autotune.report.console.LiveProgress`."""

    def start(  # noqa: D102
        self,
        total_launches: int | None,
        budget_s: float | None,
        *,
        known: Sequence[TrialRecord] = (),
        launches_left: int | None = None,
    ) -> None: ...
    def launch_started(self, n: int, description: str) -> None: ...  # noqa: D102
    def rung_done(self, record: TrialRecord) -> None: ...  # noqa: D102
    def launch_done(self, n: int) -> None: ...  # noqa: D102
    def note(self, text: str) -> None: ...  # noqa: D102
    def stop(self) -> None: ...  # noqa: D102


@dataclass(frozen=True, kw_only=True, slots=True)
class Stopped:
    """How the search ended."""

    because: str
    launches: int
    elapsed_s: float
    interrupted: bool = False


class Tuner:
    """Runs a study in a folder. All it knows is on disk, so a killed search can be resumed."""

    def __init__(
        self,
        folder: Path,
        families: Sequence[Family],
        job: Job,
        progress: Progress,
        learner: Learner | None = None,
        *,
        sampler: str = DEFAULT_SAMPLER,
        tolerance: float = TOLERANCE,
        slots: Sequence[Slot] = (Slot(),),
        hosts: Leader | None = None,
    ) -> None:
        """Take what it works with.

        `slots` are where launches run side by side; `hosts` start the ranks of other hosts, too.
        """
        self._slots = slots
        self._hosts = hosts
        self._folder = folder
        self._job = job
        self._progress = progress
        self._book = Book(families, RecordStore(folder), learner)
        named = make_sampler(
            sampler,
            families,
            seed=job.seed,
            tolerance=tolerance,
            measurement=job.measurement,
            log_correction=learner.log_correction(families) if learner else None,
        )
        self._asker = Asker(journal_of(folder), families, named, seed=job.seed)

    @property
    def records(self) -> list[TrialRecord]:
        """What was measured so far, in order."""
        return self._book.store.all()

    def left_out(self) -> list[dict[str, Any]]:
        """Return the plans of the space that measured trials rule out by now, with the reason."""
        return self._book.left_out()

    def run(
        self,
        *,
        max_launches: int | None,
        budget_s: float | None,
        after_launch: Callable[[Stopped], object],
        confirm: int = 0,
    ) -> Stopped:
        """Search until a stop rule holds, then confirm the finalists.

        Args:
            max_launches: Launches of the study, those before a resume included.
            budget_s: Seconds of this call.
            after_launch: Called after each launch, to bring summary and reports up to date.
            confirm: How many finalists to measure again at most.
        """
        started = time.monotonic()
        limits = _Limits(self._book, started, max_launches, budget_s, confirm * ROUNDS)
        try:
            self._recover()
            self._progress.start(
                max_launches,
                budget_s,
                known=self.records,
                launches_left=self._launches_left(max_launches),
            )
            teller = _Teller(
                self._progress, lambda: after_launch(self._stopped("still running", started))
            )
            with ForkServer(self._folder) as server:
                starter = self._hosts.use(server, fork=True) if self._hosts else server
                because = self._loop(starter, limits, teller)
                if confirm:
                    confirmer = Confirmer(
                        self._folder, self._job, self._book, self._progress, starter
                    )
                    confirmer.run(confirm, limits.budget_ends)
            return self._stopped(because, started)
        except KeyboardInterrupt:
            keep_finished(self._folder, self._book, self._progress.note)
            self._asker.recover(self.records)
            return replace(self._stopped("interrupted", started), interrupted=True)
        finally:
            self._progress.stop()

    def _loop(self, server: Starter, limits: _Limits, teller: _Teller) -> str:
        """Run a loop in each slot until all have stopped; return why."""
        desk = Desk()
        benches = [
            LiveBench(
                self._folder,
                self._job,
                self._book,
                self._progress.note,
                limits.budget_ends,
                # Forked ranks have the server's cores, not the slot's.
                None if slot.cores else server,
                slot.environment,
            )
            for slot in self._slots
        ]
        loops = [Loop(b, self._asker, self._book, limits, teller, desk) for b in benches]
        if len(loops) == 1:
            return loops[0].run()

        def stop_all() -> None:
            for bench in benches:
                bench.stop()

        pinned = [Pinned(loop, slot.cores) for loop, slot in zip(loops, self._slots, strict=True)]
        return run_side_by_side(pinned, desk, stop_all)

    def _recover(self) -> None:
        """Bring in what a dead search left: its ranks, its finished rungs, its open trial."""
        kill_left_ranks(self._folder)
        self._book.relearn()
        keep_finished(self._folder, self._book, self._progress.note)
        closed = self._asker.recover(self.records)
        if closed:
            self._progress.note(f"closed {closed} trial(s) of a search that was killed")

    def _stopped(self, because: str, started: float) -> Stopped:
        return Stopped(
            because=because,
            launches=len(numbered_launches(self._folder / LAUNCHES)),
            elapsed_s=time.monotonic() - started,
        )

    def _launches_left(self, max_launches: int | None) -> int:
        """Return how many launches are to come at most: one a family, or what `--trials` leaves."""
        untried = len(self._book.open_rungs())
        if max_launches is None:
            return untried
        return min(untried, max(0, max_launches - num_finished(self._book)))


def num_finished(book: Book) -> int:
    """Count the launches that measured something; one cut short uses up none of `--trials`."""
    return len({record.launch for record in book.store.all()})


class _Limits:
    def __init__(
        self,
        book: Book,
        started: float,
        max_launches: int | None,
        budget_s: float | None,
        confirming: int,
    ) -> None:
        self._book = book
        self._max_launches = max_launches
        self._confirming = confirming
        """Launches to come after the search, for which its budget must hold as well."""
        self._budget_s = budget_s
        self.budget_ends = None if budget_s is None else started + budget_s

    def time_spent(self) -> str | None:
        if self.budget_ends is None:
            return None
        if time.monotonic() >= self.budget_ends - self._reserved_s():
            return "the time budget is spent (--budget)"
        return None

    def _reserved_s(self) -> float:
        seconds = [record.launch_s for record in self._book.store.all() if record.launch_s]
        if not seconds or self._budget_s is None:
            return 0.0
        needed = self._confirming * statistics.median(seconds)
        return min(_CONFIRMING_SHARE * self._budget_s, needed)

    def launches_spent(self, under_way: int) -> str | None:
        launches = num_finished(self._book) + under_way
        if self._max_launches is not None and launches >= self._max_launches:
            return f"{self._max_launches} launches done (--trials)"
        return None


class _Teller:
    """Passes what the loop does on to the progress display and the outputs."""

    def __init__(self, progress: Progress, after_launch: Callable[[], object]) -> None:
        self._progress = progress
        self._after_launch = after_launch

    def opened(self, launch: Launch, asked: Asked) -> None:
        assert isinstance(launch, LiveLaunch)
        sizes = ", ".join(str(rung.plan.micro_batch_size) for rung in asked.planned)
        self._progress.launch_started(launch.number, f"{asked.family.name}, micro batch {sizes}")

    def measured(self, record: TrialRecord) -> None:
        self._progress.rung_done(record)

    def closed(self, launch: Launch) -> None:
        assert isinstance(launch, LiveLaunch)
        self._progress.launch_done(launch.number)
        self._after_launch()
