"""A rank's side of the protocol: its result file, its heartbeat, and dying with its parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Any

from autotune.errors import AutotuneError
from autotune.trial.protocol import (
    STARTED_VARIABLE,
    Outcome,
    Phase,
    RankError,
    RankResult,
    Request,
    RungResult,
    heartbeat_file,
    rank_result_file,
    write_message,
)

FORKED_VARIABLE = "AUTOTUNE_FORKED"
"""Set in a rank that the fork server made."""
_PR_SET_PDEATHSIG = 1
_VERSIONED = ("torch", "transformers", "accelerate", "deepspeed", "autotune-llm")


class Answer:
    """Collects what this rank found and keeps its result file up to date."""

    def __init__(self, request: Request) -> None:
        self.rank = int(os.environ["RANK"])
        self.folder = Path(os.environ["AUTOTUNE_LAUNCH_DIR"])
        self.result = RankResult(
            launch_id=request.launch_id,
            rank=self.rank,
            world_size=int(os.environ["WORLD_SIZE"]),
            versions=_versions(),
            start="fork" if os.environ.get(FORKED_VARIABLE) else "cold",
        )

    def since_start_s(self) -> float | None:
        """Return the seconds since the launch's start; None where no supervisor said when."""
        started = os.environ.get(STARTED_VARIABLE)
        return None if started is None else time.monotonic() - float(started)

    def imported(self) -> None:
        """Note how long it took until everything was imported."""
        self.result.imports_s = self.since_start_s()

    def first_step(self) -> None:
        """Note when the first step begins; later ones change nothing."""
        if self.result.ready_s is None:
            self.result.ready_s = self.since_start_s()
        if self.result.phase is Phase.LOAD:
            self.enter(Phase.STEP)

    def enter(self, phase: Phase) -> None:
        """Say what this rank is at from now on; on disk at once, for it may be killed there."""
        self.result.phase = phase
        self._write()

    def heartbeat(self) -> None:
        """Tell the supervisor that this rank is making progress.

        The first one comes when the model is prepared: how long data and model take to load
        depends on their size, and the deadline allows for that.
        """
        (self.folder / heartbeat_file(self.rank)).touch()

    def add_asserted(self, found: dict[str, Any]) -> None:
        """Record what the checks after prepare found."""
        self.result.asserted |= found
        self._write()

    def add_rung(self, rung: RungResult) -> None:
        """Record a finished rung at once: a later failure must not lose it."""
        self.result.rungs.append(rung)
        self._write()

    def finish(self) -> None:
        """Write the complete result."""
        self.result.complete = True
        self._write()

    def fail(self, error: BaseException, outcome: Outcome) -> None:
        """Write why this rank stopped. The time makes the earliest failure the root cause."""
        text = traceback.format_exc()
        sys.stderr.write(text)
        said = str(error).strip()
        if not isinstance(error, AutotuneError) and outcome is not Outcome.INVALID:
            name = type(error).__name__  # of a KeyError, the text alone is a mere name
            said = f"{name}: {said}" if said else name
        self.result.error = RankError(
            outcome=outcome,
            message=said,
            traceback=text,
            time_s=time.monotonic(),
            user_mistake=isinstance(error, AutotuneError) and error.exit_code == 2,
        )
        self.result.complete = True
        self._write()

    def _write(self) -> None:
        write_message(self.result, self.folder / rank_result_file(self.rank))
        self.heartbeat()


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies, however it dies (prctl(2)).

    The parent is the process that made it: the supervisor, or the fork server, which itself dies
    with the supervisor. A fork does not inherit the wish, so every rank asks for itself.
    """
    parent = int(os.environ["AUTOTUNE_PARENT_PID"])
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call
        os._exit(1)


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in _VERSIONED:
        try:
            found[name] = version(name)
        except ModuleNotFoundError:
            found[name] = "not installed"
    return found
