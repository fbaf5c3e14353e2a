"""What a launch needs of a rank's process, and who starts it: here, forked, or on another host."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from autotune.trial.memory_left import MemoryLeft
from autotune.trial.processes import kill_tagged, process_state
from autotune.trial.protocol import REQUEST_FILE

TAG_VARIABLE = "AUTOTUNE_TRIAL_ID"


class RankProcess(Protocol):
    """One rank's process, leader of a process group of its own."""

    @property
    def pid(self) -> int:
        """Its process id, on its host."""

    @property
    def returncode(self) -> int | None:
        """Exit code as last seen, minus the signal's number if one ended it; None before."""

    def poll(self) -> int | None:
        """Look whether it ended; return its exit code, None while it runs."""

    def state(self) -> str | None:
        """Return its state letter of proc(5) (`R`, `S`, `T` ...), None when it is gone."""

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the whole group; nothing happens when it is gone."""

    def wait(self, timeout_s: float) -> int | None:
        """Wait for its end for so long; return its exit code, None when it still runs."""

    def memory_left(self) -> int | None:
        """Return the least it had left below its own limit (RLIMIT_DATA) in its last second.

        In bytes; None without such a limit, or where nothing was seen of it.
        """

    def lost(self) -> str | None:
        """Say how the process that forked it ended, where that ended this one; else None.

        It is no fault of what the rank ran: the launch is then repeated once.
        """


class Starter(Protocol):
    """Starts ranks."""

    def start(self, number: int, folder: Path, variables: Mapping[str, str]) -> RankProcess:
        """Start a rank of the request in the launch's folder; its output goes to its log there.

        Args:
            number: which rank, of all hosts.
            folder: the launch's folder; it holds the request.
            variables: the whole environment but `RANK` and `LOCAL_RANK`, which the starter adds.
        """

    def kill_stragglers(self, tag: str) -> None:
        """Kill whatever still carries the launch's tag, grandchildren in other sessions too."""

    def notes(self) -> list[str]:
        """Return what users should know of the starts since it was asked last."""


def rank_variables(number: int, variables: Mapping[str, str]) -> dict[str, str]:
    """Return the variables a rank has to itself; the ranks of a host follow one another."""
    local = number % int(variables["LOCAL_WORLD_SIZE"])
    return {"RANK": str(number), "LOCAL_RANK": str(local)}


def rank_log(folder: Path, number: int) -> Path:
    """Return the file that a rank's output goes to."""
    return folder / f"rank-{number}.log"


class ColdStarter:
    """Starts each rank as a fresh interpreter on this host: the reference for all others."""

    def start(self, number: int, folder: Path, variables: Mapping[str, str]) -> RankProcess:
        """Start ``python -m autotune.runner`` in a session of its own."""
        with rank_log(folder, number).open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "autotune.runner", str((folder / REQUEST_FILE).resolve())],
                env={**variables, **rank_variables(number, variables)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return LocalRank(process)

    def kill_stragglers(self, tag: str) -> None:
        """Kill what carries the tag on this host."""
        kill_tagged(TAG_VARIABLE, tag)

    def notes(self) -> list[str]:
        """Return nothing."""
        return []


class LocalRank:
    """A child of this process that leads its own session."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._memory = MemoryLeft()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Exit code as last seen."""
        return self._process.returncode

    def poll(self) -> int | None:
        """Look whether it ended, and at its memory where it did not."""
        code = self._process.poll()
        if code is None:
            self._memory.look(self.pid)
        return code

    def state(self) -> str | None:
        """Return its state letter."""
        return process_state(self.pid)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to its group."""
        signal_group(self.pid, number)

    def wait(self, timeout_s: float) -> int | None:
        """Wait for its end."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=timeout_s)
        return self._process.returncode

    def memory_left(self) -> int | None:
        """Return what `poll` saw of it last."""
        return self._memory.least()

    def lost(self) -> str | None:
        """Say no: nothing stands between this process and it."""
        return None


def signal_group(leader: int, number: signal.Signals) -> None:
    """Send a signal to a process group of this host, if there still is one."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, number)
