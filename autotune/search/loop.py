"""The search loop: ask, open a launch or go on with the one that runs, measure, tell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from autotune.search.bench import Bench, Launch
from autotune.search.book import Book
from autotune.search.policy import Asked, Charge, Offer, Policy, Stop
from autotune.trial.record import TrialRecord

SPACE_SPENT = "every configuration of the space was tried"


class Limits(Protocol):
    """What ends a search from outside: its budget of time and of launches."""

    def time_spent(self) -> str | None:
        """Return why nothing more may be measured; None while something may."""
        ...

    def launches_spent(self) -> str | None:
        """Return why no further launch may be opened; None while one may."""
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
        self, bench: Bench, policy: Policy, book: Book, limits: Limits, watcher: Watcher
    ) -> None:
        self._bench = bench
        self._policy = policy
        self._book = book
        self._limits = limits
        self._watcher = watcher
        self._running: _Running | None = None

    def run(self) -> str:
        """Return why it stopped. The launch under way is closed, however this ends."""
        try:
            while True:
                asked = self._ask()
                if isinstance(asked, Stop):
                    self._close()
                    return asked.because
                self._measure(asked)
        finally:
            self._end()

    def _ask(self) -> Asked | Stop:
        spent = self._limits.time_spent()
        if spent is not None:
            return Stop(because=spent)
        rungs = self._book.open_rungs()
        running = self._running
        if running is not None and not running.launch.alive:
            self._close()
            running = None
        if not rungs:
            return Stop(because=SPACE_SPENT)
        offer = Offer(
            rungs=rungs,
            running=running.launch.family.name if running else None,
            above=running.above if running else 0,
        )
        spent = self._limits.launches_spent()
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
            self._close()
            started_s, opened = self._bench.spent_s, True
            launch = self._bench.open(asked.family, asked.planned)
            running = self._running = _Running(launch=launch)
            self._watcher.opened(launch, asked)
        assert running is not None
        record = running.launch.measure(asked.estimate, give_up_step_s=asked.give_up_step_s)
        running.above = size
        if record is None:
            return
        for added in self._book.add(asked.family, [record]):
            seconds = self._bench.spent_s - started_s
            self._policy.tell(asked.family, added, Charge(seconds=seconds, opened=opened))
            self._watcher.measured(added)

    def _close(self) -> None:
        ended = self._end()
        if ended is not None:
            self._watcher.closed(ended)

    def _end(self) -> Launch | None:
        running, self._running = self._running, None
        if running is None:
            return None
        running.launch.close()
        self._policy.abandon()
        return running.launch
