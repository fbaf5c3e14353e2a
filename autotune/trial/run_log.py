"""The log of a full run, one JSON object a line, in the order the run's steps were taken."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

CUT_FILE = "log.cut.jsonl"
"""Lines of steps after a checkpoint that a later run went on from: those steps ran again."""


def split_log(log: bytes, step: int) -> tuple[bytes, bytes]:
    """Return the lines up to a step, and those after it with a last line that was not finished."""
    kept: list[bytes] = []
    cut: list[bytes] = []
    for line in log.splitlines(keepends=True):
        (kept if _step(line) <= step else cut).append(line)
    return b"".join(kept), b"".join(cut)


def _step(line: bytes) -> float:
    """Return the step of a line; infinity for what a kill left half-written."""
    if not line.endswith(b"\n"):
        return math.inf
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf


def cut_log(log: Path, step: int) -> None:
    """Move the lines after a step into `CUT_FILE` beside the log, so that no step stands twice.

    The log is replaced as a whole: whoever follows it sees another file, and `split_log` tells how
    much of it is old. A kill between the two writes leaves the lines in both files.
    """
    if not log.exists():
        return
    kept, cut = split_log(log.read_bytes(), step)
    if not cut:
        return
    with (log.parent / CUT_FILE).open("ab") as side:
        side.write(cut if cut.endswith(b"\n") else cut + b"\n")
    shorter = log.with_name(f".{log.name}.tmp")
    shorter.write_bytes(kept)
    os.replace(shorter, log)
