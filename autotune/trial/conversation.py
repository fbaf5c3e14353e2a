"""A launch that measures what it is asked, one rung after another, until it fails or is closed."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from autotune.errors import AutotuneError
from autotune.trial.folder import read_result, read_results
from autotune.trial.launch import Ended, Running
from autotune.trial.outcome import read_rung
from autotune.trial.protocol import Outcome, Request, Rung, RungOrder, rung_file, write_message
from autotune.trial.ranks import Starter
from autotune.trial.record import TrialRecord
from autotune.trial.watch import Limits

_POLL_S = 0.05
"""From one look at the answers to the next: what a rung waits for at most."""
_CLOSE_S = 20.0
"""How long ranks may take to end by themselves once they were told."""


class ConversationalLaunch:
    """One start of all ranks; `measure` asks them for a rung, `close` ends them.

    Close it whatever happens (it is a context manager): ranks are stopped there. They also stop
    when this process dies, or is silent for `Request.idle_limit_s`.
    """

    def __init__(
        self,
        request: Request,
        folder: Path,
        limits: Limits,
        *,
        starter: Starter | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        """Start the ranks; they import, build the model and wait for the first rung.

        Args:
            request: what to run; its rungs are left out of account.
            folder: where request, logs, orders and results go; created.
            limits: `deadline_s` holds from each rung's order to its answer, the first one's start
                included; `hang_s` as everywhere.
            starter: what starts the ranks, such as a `ForkServer`; None starts them cold.
            environment: more variables for the ranks.
        """
        self._request = request.model_copy(update={"converses": True, "rungs": []})
        self._folder = folder
        self._limits = limits
        self._starter = starter
        self._environment = environment
        self._notes: list[str] = []
        self._ended: Ended | None = None
        self._repeated = False
        self._begun = time.monotonic()
        self._begin()

    def __enter__(self) -> ConversationalLaunch:
        """Return it."""
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Close it; after an exception without waiting for the ranks."""
        self.close(at_once=kind is not None)

    @property
    def alive(self) -> bool:
        """Whether it can still be asked."""
        return self._ended is None

    def measure(
        self,
        rung: Rung,
        *,
        give_up_step_s: float | None = None,
        deadline_s: float | None = None,
    ) -> TrialRecord:
        """Measure a rung; its micro batch is larger than those before it.

        A rung that does not come out well ends the launch. Should the starter have died and taken
        the ranks along, they are started again and the rung repeated, once a launch.

        Args:
            rung: what to measure.
            give_up_step_s: it may end early (`TrialRecord.cut_short`) once its step, at the plan's
                accumulation, is surely longer than this.
            deadline_s: seconds for this rung instead of the limits' own.

        Returns:
            The record, without what a study adds: launch number, predictions, folder.

        Raises:
            RuntimeError: the launch is over.
            AutotuneError: what a rank found to be the user's mistake.
        """
        if self._ended is not None:
            raise RuntimeError("this launch is over; start another")
        plan = self._request.plan_object()
        while True:
            asked = time.monotonic()
            self._asked += 1
            self._write(rung, give_up_step_s)
            allowed = deadline_s if deadline_s is not None else self._limits.deadline_s
            deadline = None
            if allowed is not None:
                deadline = asked + allowed, f"the deadline of {allowed:.0f} s for this rung"
            if self._running.watch(
                hang_s=self._limits.hang_s,
                deadline=deadline,
                until=lambda: self._answered(rung),
                poll_s=_POLL_S,
            ):
                results = read_results(self._folder)
                return read_rung(plan, rung, results, Outcome.OK, "")
            ended = self._end()
            lost = self._running.lost()
            if lost is None or self._repeated or self._ended is not None:
                self._ended = ended
                outcome = ended.outcome
                message = ended.message
                if outcome is Outcome.OK:  # they ended well, and without an answer
                    outcome, message = Outcome.CRASHED, "the ranks ended without an answer"
                return read_rung(plan, rung, ended.results, outcome, message)
            self._repeated = True
            self._notes.append(f"{lost}; the launch is repeated")
            self._begin()

    def close(self, *, at_once: bool = False) -> Ended:
        """End the ranks, if they have not ended; return how the launch ended, its notes included.

        A second call returns the same.

        Args:
            at_once: stop them in the middle of what they do, instead of telling them to end.

        Raises:
            AutotuneError: what a rank found to be the user's mistake.
        """
        if self._ended is None:
            try:
                if not at_once:
                    self._asked += 1
                    self._write(None, None)
                    limit = time.monotonic() + _CLOSE_S, "its end"
                    self._running.watch(hang_s=_CLOSE_S, deadline=limit, poll_s=_POLL_S)
            finally:
                self._ended = self._end()
        return replace(self._ended, notes=[*self._notes, *self._ended.notes])

    def _begin(self) -> None:
        self._asked = 0
        self._running = Running(
            self._request, self._folder, environment=self._environment, starter=self._starter
        )
        with ExitStack() as started:
            started.callback(self._running.stop)  # on Ctrl-C too: no rank must stay
            self._running.start()
            started.pop_all()

    def _write(self, rung: Rung | None, give_up_step_s: float | None) -> None:
        order = RungOrder(launch_id=self._running.tag, rung=rung, give_up_step_s=give_up_step_s)
        write_message(order, self._folder / rung_file(self._asked))

    def _answered(self, rung: Rung) -> bool:
        """Say whether every rank has measured the rung."""
        for rank in self._running.ranks:
            result = read_result(self._folder, rank.number, self._running.tag)
            if result is None or result.error is not None:
                return False
            if not any(
                answer.micro_batch_size == rung.micro_batch_size and answer.outcome is Outcome.OK
                for answer in result.rungs
            ):
                return False
        return True

    def _end(self) -> Ended:
        self._running.stop()
        if self._starter is not None:
            self._notes += self._starter.notes()
        try:
            ended = self._running.end()
        except AutotuneError as error:
            self._ended = Ended(
                outcome=Outcome.CRASHED,
                message=str(error),
                rank=None,
                exit_codes=[],
                elapsed_s=time.monotonic() - self._begun,
            )
            raise
        return replace(ended, elapsed_s=time.monotonic() - self._begun)
