"""Ranks forked from a process that has imported everything: `ForkServer`, a `Starter`.

What the imports read from the environment must be there before them, so a server serves launches
that differ in `PER_LAUNCH` alone; for any other environment it is started anew. Where it cannot be
used (it does not start, or refuses), ranks start cold, and `notes` says why.
"""

from __future__ import annotations

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

from autotune.trial.processes import process_state
from autotune.trial.protocol import REQUEST_FILE, STARTED_VARIABLE
from autotune.trial.ranks import (
    TAG_VARIABLE,
    ColdStarter,
    RankProcess,
    rank_log,
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

    def __init__(self, folder: Path) -> None:
        """Start nothing yet.

        Args:
            folder: where the server's log goes.
        """
        self._folder = folder
        self._cold = ColdStarter()
        self._lock = threading.RLock()
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._buffer = b""
        self._environment: dict[str, str] = {}
        self._answers: dict[int, dict[str, Any]] = {}
        self._exits: dict[int, int] = {}
        self._next_id = 0
        self._refused: str | None = None
        self._lost: str | None = None
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
        variables = {**variables, "RANK": str(number), "LOCAL_RANK": str(number)}
        with self._lock:
            if self._refused is None:
                self._be_ready(variables)
            if self._refused is None:
                order = {
                    "request": str((folder / REQUEST_FILE).resolve()),
                    "log": str(rank_log(folder, number).resolve()),
                    "variables": variables,
                }
                answer = self._ask(order)
                if answer is not None and "pid" in answer:
                    return ForkedRank(self, answer["pid"])
                self._give_up(answer["refused"] if answer else "the fork server died")
        return self._cold.start(number, folder, variables)

    def kill_stragglers(self, tag: str) -> None:
        """Kill what carries the tag on this host."""
        self._cold.kill_stragglers(tag)

    def lost(self) -> str | None:
        """Say whether the server died since this was asked last."""
        with self._lock:
            self.listen()
            lost, self._lost = self._lost, None
            return lost

    def notes(self) -> list[str]:
        """Return what was noted since this was asked last."""
        with self._lock:
            notes, self._notes = self._notes, []
            return notes

    def close(self) -> None:
        """End the server; its ranks die with it."""
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

    def exit_code(self, pid: int) -> int | None:
        """Return how a forked rank ended; None while it runs."""
        with self._lock:
            self.listen()
            code = self._exits.get(pid)
            if code is None and self._process is None:
                code = self._exits[pid] = -int(signal.SIGKILL)  # it died with the server
            return code

    def listen(self, timeout_s: float = 0.0) -> None:
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
                    self._exits[line["exited"]] = line["code"]
                else:
                    self._answers[line["id"]] = line

    def _be_ready(self, variables: Mapping[str, str]) -> None:
        wanted = {k: v for k, v in variables.items() if k not in PER_LAUNCH}
        if self._process is not None:
            self.listen()
        if self._process is not None and wanted != self._environment:
            self.close()
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
        self._exits.clear()
        self.imports_s = None
        deadline = time.monotonic() + _READY_S
        while self.imports_s is None and self._channel is not None and time.monotonic() < deadline:
            self.listen(1.0)
        if self.imports_s is None:
            self._lost = None
            self._give_up(f"the fork server did not start; see {self._folder / SERVER_LOG}")

    def _ask(self, order: dict[str, Any]) -> dict[str, Any] | None:
        """Return the server's answer; None when it died or did not answer."""
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
            if self._channel is None or time.monotonic() > deadline:
                return None
            self.listen(1.0)
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
        self._lost = f"the fork server died with {code}"

    def _give_up(self, why: str) -> None:
        self.close()
        self._refused = why
        self._notes.append(f"{why}: ranks start cold")


class ForkedRank:
    """A child of the server."""

    def __init__(self, server: ForkServer, pid: int) -> None:
        self._server = server
        self._pid = pid
        self._returncode: int | None = None

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._pid

    @property
    def returncode(self) -> int | None:
        """Exit code as last seen."""
        return self._returncode

    def poll(self) -> int | None:
        """Look whether it ended."""
        if self._returncode is None:
            self._returncode = self._server.exit_code(self._pid)
        return self._returncode

    def state(self) -> str | None:
        """Return its state letter."""
        return process_state(self._pid)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to its group."""
        if self._returncode is None:
            signal_group(self._pid, number)

    def wait(self, timeout_s: float) -> int | None:
        """Wait for its end."""
        deadline = time.monotonic() + timeout_s
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return self._returncode
