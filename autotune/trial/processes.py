"""What Linux says about processes: their state, their tags, and who was killed for memory."""

from __future__ import annotations

import os
import signal
from pathlib import Path


def process_state(pid: int) -> str | None:
    """Return the state letter of proc(5) (`R`, `S`, `T` ...), or None when there is no process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text.rpartition(")")[2].split()[0]


def tagged_processes(variable: str, value: str) -> list[int]:
    """Return the processes whose environment holds ``variable=value`` (this one excepted)."""
    wanted = f"{variable}={value}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:  # ended meanwhile, or another user's
            continue
    return found


def kill_tagged(variable: str, value: str) -> list[int]:
    """Kill the stragglers of a launch: grandchildren that made sessions of their own."""
    killed = tagged_processes(variable, value)
    for pid in killed:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return killed


def oom_kill_count() -> int:
    """Return how many processes the kernel has killed for memory since boot (proc/vmstat)."""
    for line in Path("/proc/vmstat").read_text().splitlines():
        name, _, value = line.partition(" ")
        if name == "oom_kill":
            return int(value)
    return 0
