"""The search loop: ask, open a launch or go on with the one that runs, measure, tell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from autotune.search.bench import Bench, Launch
from autotune.search.book import Book
from autotune.search.parallel import OTHERS_MEASURE, Desk
from autotune.search.policy import Asked, Charge, Offer, Policy, Stop
from autotune.trial.record import TrialRecord

SPACE_SPENT = "every configuration of the space was tried"


class Limits(Protocol):
    """What ends a search from outside: its budget of time and of launches."""

    def time_spent(self) -> str | None:
        """Return why nothing more may be measured; None while something may."""
        ...

    def launches_spent(self, under_way: int) -> str | None:
        """Return why no further launch may be opened; None while one may.

        Args:
            under_way: Launches that run beside this loop's and have no record yet.
        """
        ...


class Watcher(Protocol):
    """Is told what the loop does."""

    def opened(self, launch: Launch, asked: Asked) -> None: ...  # noqa: D102
    def measured(self, record: TrialRecord) -> None: ...  # noqa: D102
    def closed(self, launch: Launch) -> None: ...  # noqa: D102


@dataclass(slots=True)
class _Running:
    launch: Launch
    above: int = 0


class Loop:
    """Runs a policy on a bench until nothing is left, or a limit or the policy says stop."""

    def __init__(
        self,
        bench: Bench,
        policy: Policy,
        book: Book,
        limits: Limits,
        watcher: Watcher,
        desk: Desk | None = None,
    ) -> None:
        """Take what it works with; `desk` is shared with other loops of the same search."""
        self._desk = desk or Desk()
        self._bench = bench
        self._policy = policy
        self._book = book
        self._limits = limits
        self._watcher = watcher
        self._running: _Running | None = None
        self._next: str | None = None
        """Family of what was asked last; its trial is under way though its launch may end."""

    def run(self) -> str:
        """Return why it stopped. The launch under way is closed, however this ends."""
        try:
            while True:
                with self._desk.lock:
                    self._next = None  # a launch that failed ends what was asked of it
                    asked = self._ask()
                    self._next = asked.family.name if isinstance(asked, Asked) else None
                    if self._next is not None:
                        self._desk.take(self, self._next)
                if isinstance(asked, Stop):
                    self._close()
                    return asked.because
                self._measure(asked)
        finally:
            self._next = None
            self._end()

    def _ask(self) -> Asked | Stop:
        spent = self._limits.time_spent()
        if spent is not None:
            return Stop(because=spent)
        if self._desk.stopping:
            return Stop(because="interrupted")
        rungs = self._book.open_rungs()
        running = self._running
        if running is not None and not running.launch.alive:
            self._close()
            running = None
        if not rungs:
            return Stop(because=SPACE_SPENT)
        others = self._desk.families_of_others(self)
        rungs = {name: ladder for name, ladder in rungs.items() if name not in others}
        if not rungs:
            return Stop(because=OTHERS_MEASURE)
        offer = Offer(
            rungs=rungs,
            running=running.launch.family.name if running else None,
            above=running.above if running else 0,
        )
        spent = self._limits.launches_spent(self._desk.num_unmeasured(self))
        if spent is not None:
            reachable = offer.reachable()
            if running is None or not reachable:
                return Stop(because=spent)
            offer = Offer(
                rungs={running.launch.family.name: reachable},
                running=offer.running,
                above=offer.above,
            )
        return self._policy.ask(offer)

    def _measure(self, asked: Asked) -> None:
        started_s, opened = self._bench.spent_s, False
        size = asked.estimate.plan.micro_batch_size
        running = self._running
        within_reach = (
            running is not None
            and running.launch.family.name == asked.family.name
            and size > running.above
        )
        if not within_reach:
            self._close(keep_family=True)
            started_s, opened = self._bench.spent_s, True
            launch = self._bench.open(asked.family, asked.planned)
            running = self._running = _Running(launch=launch)
            with self._desk.lock:
                self._watcher.opened(launch, asked)
        assert running is not None
        record = running.launch.measure(asked.estimate, give_up_step_s=asked.give_up_step_s)
        running.above = size
        with self._desk.lock:
            if record is None or self._desk.stopping:
                return
            for added in self._book.add(asked.family, [record]):
                seconds = self._bench.spent_s - started_s
                self._policy.tell(asked.family, added, Charge(seconds=seconds, opened=opened))
                self._desk.measured(self)
                self._watcher.measured(added)

    def _close(self, *, keep_family: bool = False) -> None:
        ended = self._end(keep_family=keep_family)
        if ended is not None:
            with self._desk.lock:
                self._watcher.closed(ended)

    def _end(self, *, keep_family: bool = False) -> Launch | None:
        """Close the launch under way; its family is free, unless the desk has the next one."""
        running, self._running = self._running, None
        if running is not None:
            running.launch.close()
        with self._desk.lock:
            if running is not None and running.launch.family.name != self._next:
                self._policy.abandon(running.launch.family)
            if not keep_family:
                self._desk.free(self)
        return running.launch if running is not None else None
