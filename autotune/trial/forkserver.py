"""Ranks forked from a process that has imported everything: `ForkServer`, a `Starter`.

What the imports read from the environment must be there before them, so a server serves launches
that differ in `PER_LAUNCH` alone; for any other environment it is started anew. Where it cannot be
used (it does not start, or refuses), ranks start cold, and `notes` says why.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autotune.trial.memory_left import MemoryLeft
from autotune.trial.processes import process_state
from autotune.trial.protocol import REQUEST_FILE, STARTED_VARIABLE
from autotune.trial.ranks import (
    TAG_VARIABLE,
    ColdStarter,
    RankProcess,
    rank_log,
    rank_variables,
    signal_group,
)

PER_LAUNCH = frozenset(
    {
        TAG_VARIABLE,
        STARTED_VARIABLE,
        "AUTOTUNE_LAUNCH_DIR",
        "AUTOTUNE_PARENT_PID",
        "CUDA_VISIBLE_DEVICES",
        "MASTER_ADDR",
        "MASTER_PORT",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "RANK",
        "LOCAL_RANK",
    }
)
"""What the imports do not read, or, as torch does with CUDA_VISIBLE_DEVICES, read again later."""
_ROOM_VARIABLE = "AUTOTUNE_ROOM"
_ROOM = 16384
"""Bytes kept where forked ranks show an environment larger than the server's."""
_READY_S = 300.0
_ANSWER_S = 60.0
SERVER_LOG = "fork-server.log"


class ForkServer:
    """Starts ranks by forking. Closing it, or this process's death, ends it and its ranks.

    Threads may share one; it must be made and first used in the main thread, because the kernel
    ends the server with the thread that started it.
    """

    def __init__(self, folder: Path, *, ignored: frozenset[str] = frozenset()) -> None:
        """Start nothing yet.

        Args:
            folder: where the server's log goes.
            ignored: more variables that may differ from launch to launch.
        """
        self._folder = folder
        self._per_launch = PER_LAUNCH | ignored
        self._cold = ColdStarter()
        self._lock = threading.RLock()
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._buffer = b""
        self._environment: dict[str, str] = {}
        self._answers: dict[int, ForkedRank | str] = {}
        """By order: the rank, or why there is none."""
        self._ranks: dict[int, ForkedRank] = {}
        """By process id, those that the running server forked and that have not ended."""
        self._next_id = 0
        self._refused: str | None = None
        self._notes: list[str] = []
        self.imports_s: float | None = None
        """Seconds the running server took to import everything; None before one was ready."""

    @property
    def pid(self) -> int | None:
        """The server's process; None while there is none."""
        return self._process.pid if self._process is not None else None

    def __enter__(self) -> ForkServer:
        """Return it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def start(self, number: int, folder: Path, variables: Mapping[str, str]) -> RankProcess:
        """Fork a rank, or start it cold where that is not possible."""
        variables = {**variables, **rank_variables(number, variables)}
        order = {
            "request": str((folder / REQUEST_FILE).resolve()),
            "log": str(rank_log(folder, number).resolve()),
            "variables": variables,
        }
        with self._lock:
            for _ in range(2):  # a server that dies is started again, once
                if self._refused is None:
                    self._be_ready(variables)
                answer = self._ask(order) if self._refused is None else None
                if isinstance(answer, ForkedRank):
                    return answer
                if answer is not None:
                    self._give_up(answer)
            if self._refused is None:
                self._give_up("the fork server failed twice")
        return self._cold.start(number, folder, variables)

    def kill_stragglers(self, tag: str) -> None:
        """Kill what carries the tag on this host."""
        self._cold.kill_stragglers(tag)

    def notes(self) -> list[str]:
        """Return what was noted since this was asked last."""
        with self._lock:
            notes, self._notes = self._notes, []
            return notes

    def close(self, why: str = "the fork server was closed") -> None:
        """End the server; its ranks die with it, and say why."""
        with self._lock:
            process, self._process = self._process, None
            if self._channel is not None:
                self._channel.close()
                self._channel = None
            if process is not None:
                try:
                    process.wait(5)
                except subprocess.TimeoutExpired:  # still importing, or stopped
                    process.kill()
                    process.wait(30)
            self._end_ranks(why)

    def listen(self) -> None:
        """Take in what the server has said, so that its ranks know how they ended."""
        with self._lock:
            self._listen(0.0)

    def _listen(self, timeout_s: float) -> None:
        """Take in what the server says, waiting so long for a first word."""
        while self._channel is not None:
            if not select.select([self._channel], [], [], timeout_s)[0]:
                return
            timeout_s = 0.0
            try:
                received = self._channel.recv(1 << 16)
            except ConnectionResetError:
                received = b""
            if not received:
                self._note_death()
                return
            self._buffer += received
            *lines, self._buffer = self._buffer.split(b"\n")
            for line in map(json.loads, lines):
                if "ready" in line:
                    self.imports_s = line["ready"]
                elif "exited" in line:
                    self._ranks.pop(line["exited"]).end(line["code"])
                elif "refused" in line:
                    self._answers[line["id"]] = line["refused"]
                else:
                    rank = self._ranks[line["pid"]] = ForkedRank(self, line["pid"])
                    self._answers[line["id"]] = rank

    def _be_ready(self, variables: Mapping[str, str]) -> None:
        wanted = {k: v for k, v in variables.items() if k not in self._per_launch}
        self._listen(0.0)
        if self._process is not None and wanted != self._environment:
            self.close("the fork server was started anew for another environment")
        if self._process is None:
            self._spawn(variables, wanted)

    def _spawn(self, variables: Mapping[str, str], wanted: dict[str, str]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        ours, theirs = socket.socketpair()
        environment = wanted | {_ROOM_VARIABLE: "-" * _ROOM}
        if "CUDA_VISIBLE_DEVICES" in variables:
            environment["CUDA_VISIBLE_DEVICES"] = variables["CUDA_VISIBLE_DEVICES"]
        if threading.current_thread() is threading.main_thread():
            environment["AUTOTUNE_PARENT_PID"] = str(os.getpid())
        with theirs, (self._folder / SERVER_LOG).open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "autotune.runner.server", str(theirs.fileno())],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[theirs.fileno()],
            )
        self._channel, self._buffer, self._environment = ours, b"", wanted
        self.imports_s = None
        deadline = time.monotonic() + _READY_S
        while self.imports_s is None and self._channel is not None and time.monotonic() < deadline:
            self._listen(1.0)
        if self.imports_s is None:
            self._give_up(f"the fork server did not start; see {self._folder / SERVER_LOG}")

    def _ask(self, order: dict[str, Any]) -> ForkedRank | str | None:
        """Return a rank, or why the server refused; None when it died or did not answer."""
        self._next_id += 1
        number = self._next_id
        assert self._channel is not None
        try:
            self._channel.sendall(json.dumps(order | {"id": number}).encode() + b"\n")
        except (BrokenPipeError, ConnectionResetError):
            self._note_death()
            return None
        deadline = time.monotonic() + _ANSWER_S
        while number not in self._answers:
            if self._channel is None:
                return None
            if time.monotonic() > deadline:
                # Closed, not only given up: it might still fork what is asked for elsewhere then.
                said = f"the fork server did not answer in {_ANSWER_S:.0f} s"
                self.close(said)
                self._notes.append(said)
                return None
            self._listen(1.0)
        return self._answers.pop(number)

    def _note_death(self) -> None:
        assert self._process is not None and self._channel is not None
        self._channel.close()
        self._channel = None
        try:
            code: int | None = self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait(30)
        self._process = None
        said = f"the fork server died with {code}"
        if not self._ranks:  # else their launches say so
            self._notes.append(said)
        self._end_ranks(said)

    def _end_ranks(self, why: str) -> None:
        """Count the ranks that still ran as killed: they die with the server that forked them."""
        for rank in self._ranks.values():
            rank.end(-int(signal.SIGKILL), lost=why)
        self._ranks.clear()

    def _give_up(self, why: str) -> None:
        self.close(why)
        self._refused = why
        self._notes.append(f"{why}: ranks start cold")


class ForkedRank:
    """A child of the server."""

    def __init__(self, server: ForkServer, pid: int) -> None:
        self._server = server
        self._pid = pid
        self._returncode: int | None = None
        self._memory = MemoryLeft()
        self._lost: str | None = None

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._pid

    @property
    def returncode(self) -> int | None:
        """Exit code as last seen."""
        return self._returncode

    def poll(self) -> int | None:
        """Look whether it ended, and at its memory where it did not."""
        if self._returncode is None:
            self._server.listen()
        if self._returncode is None:
            self._memory.look(self._pid)
        return self._returncode

    def memory_left(self) -> int | None:
        """Return what `poll` saw of it last."""
        return self._memory.least()

    def lost(self) -> str | None:
        """Say how the server that forked it died, where that ended it."""
        return self._lost

    def end(self, code: int, *, lost: str | None = None) -> None:
        """Note how it ended, as its server says or as that server's own end does."""
        self._lost = lost
        self._returncode = code  # last: other threads look at it first

    def state(self) -> str | None:
        """Return its state letter."""
        return process_state(self._pid)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to its group."""
        if self.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(self._pid) == self._pid:
                signal_group(self._pid, number)
            else:
                os.kill(self._pid, number)  # just forked: its group is still the server's

    def wait(self, timeout_s: float) -> int | None:
        """Wait for its end."""
        deadline = time.monotonic() + timeout_s
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return self._returncode
