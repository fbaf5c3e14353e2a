"""How near a rank came to its own limit of memory, as seen from outside.

Native code that gets no memory may follow a null pointer or abort: the rank dies without a word,
and only what was seen of it before tells that from a crash.
"""

from __future__ import annotations

import resource
import time
from collections import deque
from pathlib import Path

TWO_STACKS_BYTES = 16 * 2**20
"""Two thread stacks of 8 MiB (the default of `ulimit -s`): the largest blocks that torch does not
ask for."""
_EVERY_S = 0.1
_REMEMBERED = 10
"""Looks, a second of them: a step's peak comes and goes."""


class MemoryLeft:
    """What a process had left in its last second."""

    def __init__(self) -> None:
        self._seen: deque[int] = deque(maxlen=_REMEMBERED)
        self._looked = 0.0

    def look(self, pid: int) -> None:
        """Look at a process that runs; a look soon after another does nothing."""
        now = time.monotonic()
        if now - self._looked < _EVERY_S:
            return
        self._looked = now
        left = memory_left(pid)
        if left is not None:
            self._seen.append(left)

    def least(self) -> int | None:
        """Return the least seen, in bytes; None where there is no limit, or nothing was seen."""
        return min(self._seen, default=None)


def memory_left(pid: int) -> int | None:
    """Return the bytes from a process's VmData to its RLIMIT_DATA; None without one, or no process.

    It is what `CpuGauge.limit` sets and the kernel checks, see proc(5) and getrlimit(2).
    """
    try:
        limit = resource.prlimit(pid, resource.RLIMIT_DATA)[0]
        if limit == resource.RLIM_INFINITY:
            return None
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # ended meanwhile
        return None
    _, found, rest = status.partition("VmData:")  # not there once it is a zombie
    return limit - int(rest.split()[0]) * 1024 if found else None
