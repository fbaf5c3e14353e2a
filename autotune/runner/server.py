"""The fork server: ``python -m autotune.runner.server SOCKET``, with everything imported once.

It speaks JSON lines over the socket whose number it is given; `autotune.trial.forkserver` is the
other end:

- it says ``{"ready": seconds, "threads": n}`` once after its imports;
- asked ``{"id": 1, "request": path, "log": path, "variables": {...}}`` it forks one rank and
  answers ``{"id": 1, "pid": 99}``, or ``{"id": 1, "refused": why}``;
- it says ``{"exited": 99, "code": 0}`` of each rank that ended, minus the number of a signal.

It ends when the socket closes, and its ranks die with it. It never runs an operator, so no OpenMP
pool exists that a child would wait for, and never touches CUDA, whose contexts do not survive a
fork; should anything have done so, it refuses to fork.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import socket
import sys
import time
import warnings
from pathlib import Path
from typing import Any, NoReturn

from autotune.runner.answer import FORKED_VARIABLE, die_with_parent
from autotune.runner.cpu_info import ask_cpu_once
from autotune.runner.rank import run_rank

_STARTED = time.monotonic()
_ENVIRONMENT = dict(os.environ)
"""Before the imports."""


def main() -> None:
    """Import, then serve until the supervisor closes the socket or dies."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    if os.environ.get("AUTOTUNE_PARENT_PID"):
        die_with_parent()
    from autotune.runner.imports import import_everything

    import_everything()
    Server(channel).serve()


class Server:
    """Forks ranks on request and tells of their ends."""

    def __init__(self, channel: socket.socket) -> None:
        from autotune.runner.mappings import resident_file_pages

        self._channel = channel
        self._buffer = b""
        self._woken, waker = socket.socketpair()
        for end in (self._woken, waker):
            end.setblocking(False)
        self._waker = waker
        signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the supervisor's
        self._threads = _num_threads()
        # Imports set variables, too, which a cold rank would have.
        self._set_by_imports = {k: v for k, v in os.environ.items() if _ENVIRONMENT.get(k) != v}
        self._file_pages = resident_file_pages()
        self._say({"ready": time.monotonic() - _STARTED, "threads": self._threads})

    def serve(self) -> None:
        """Answer requests until the socket closes."""
        while True:
            readable, _, _ = select.select([self._channel, self._woken], [], [])
            if self._woken in readable:
                self._woken.recv(4096)
                self._reap()
            if self._channel in readable:
                received = self._channel.recv(1 << 20)
                if not received:
                    os._exit(0)
                self._buffer += received
                *lines, self._buffer = self._buffer.split(b"\n")
                for line in lines:
                    self._fork(json.loads(line))

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            self._say({"exited": pid, "code": os.waitstatus_to_exitcode(status)})

    def _fork(self, order: dict[str, Any]) -> None:
        why = self._unsafe()
        if why is not None:
            self._say({"id": order["id"], "refused": why})
            return
        if _loads_cpu_adam(order["request"]):
            ask_cpu_once()
        with warnings.catch_warnings():
            # Python warns of every thread; those here are pools that prepare for a fork.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid:
            self._say({"id": order["id"], "pid": pid})
            return
        try:
            self._become_rank(order)
        finally:  # a forked child must not go on as the server, whatever stopped it
            import traceback

            traceback.print_exc()
            os._exit(1)

    def _unsafe(self) -> str | None:
        """Say why a forked rank could not run, if so."""
        from autotune.runner.mappings import touched_cuda

        if touched_cuda():
            return "the fork server holds a CUDA context, which no forked rank could use"
        if _num_threads() > self._threads:
            return "the fork server has started threads, which no forked rank would have"
        return None

    def _become_rank(self, order: dict[str, Any]) -> NoReturn:
        from autotune.runner.mappings import populate, show_environment

        server = os.getppid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for end in (self._channel, self._woken, self._waker):
            end.close()
        os.setsid()
        _redirect(order["log"])
        variables = order["variables"] | self._set_by_imports
        variables |= {"AUTOTUNE_PARENT_PID": str(server), FORKED_VARIABLE: "1"}
        os.environ.clear()
        os.environ.update(variables)
        own = [name for name in variables if name.startswith("AUTOTUNE_") or "RANK" in name]
        show_environment(variables, own)
        _reseed()
        populate(self._file_pages)
        run_rank(Path(order["request"]))

    def _say(self, message: dict[str, Any]) -> None:
        try:
            self._channel.sendall(json.dumps(message).encode() + b"\n")
        except (BrokenPipeError, ConnectionResetError):  # the supervisor is gone
            os._exit(0)


def _loads_cpu_adam(request: str) -> bool:
    plan = json.loads(Path(request).read_text())["plan"]
    return plan["engine"] == "deepspeed" and bool(plan.get("offload_optimizer"))


def _redirect(log: str) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for old, new in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(old, new)
    os.close(output)
    os.close(nothing)


def _reseed() -> None:
    """Draw new seeds, as every fresh interpreter has them (torch's default is a constant)."""
    import numpy as np

    random.seed()
    np.random.seed()


def _num_threads() -> int:
    return len(os.listdir("/proc/self/task"))


if __name__ == "__main__":
    main()
