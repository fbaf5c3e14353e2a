"""What real ranks held: from the windows each rank wrote to one row a configuration."""

from __future__ import annotations

import csv
import json
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

INSTANTS = (
    "forward", "forward_end", "loss", "head_backward", "backward_top", "backward",
    "backward_bottom", "embedding_backward",
)  # fmt: skip
"""Of a micro-step; those of a later one begin with ``later_``."""
REST = ("optimizer_step", "evaluation", "gather")
COLUMNS = (
    "name", "peak", "peak_instant", "rest", "prepared", "loading_peak", "parameters", "optimizer",
    "gradients", *INSTANTS, *(f"later_{name}" for name in INSTANTS), *REST,
)  # fmt: skip
"""Bytes of the rank that held most; empty where a configuration has no such instant.

``rest`` is what lives between two steps, ``prepared`` before the first, ``loading_peak`` the
highest before it.
"""

_STEPS = 2
"""Optimizer steps of a run; the last is what is read."""


def measured_row(name: str, folder: Path, world: int) -> dict[str, Any]:
    """Read the ranks' files."""
    highest: dict[str, int] = defaultdict(int)
    for rank in range(world):
        result = json.loads((folder / f"rank-{rank}.memory.json").read_text())
        for column, value in (_of_rank(result["windows"]) | result["found"]).items():
            highest[column] = max(highest[column], value)
    instants = {k: v for k, v in highest.items() if k in COLUMNS[9:] and k != "gather"}
    top = max(instants, key=lambda key: instants[key])
    return {"name": name, **highest, "peak": instants[top], "peak_instant": top}


def _of_rank(windows: list[dict[str, Any]]) -> dict[str, int]:
    found: dict[str, int] = defaultdict(int)
    steps = [w for w in windows if re.match(rf"{_STEPS}\.\d", w["name"])]
    last = max(int(w["name"].split(".")[1]) for w in steps)
    layers = max(int(m[1]) for w in steps if (m := re.search(r"backward_(\d+)", w["name"])))
    for (micro, phase), peak in _settled(steps, last).items():
        for column in _columns(phase, micro, last, layers):
            found[column] = max(found[column], peak)
    for window in windows:
        phase = window["name"].split(".")[-1]
        if window["name"].startswith(f"{_STEPS + 1}."):
            column = "gather" if phase in ("gather", "end") else "evaluation"
            found[column] = max(found[column], window["peak_bytes"])
        if phase == "prepared":
            found["prepared"] = window["start_bytes"]
        if phase == "between_steps":
            found["rest"] = window["start_bytes"]
        if phase == "start":
            found["loading_peak"] = window["peak_bytes"]
    return found


def _settled(steps: list[dict[str, Any]], last: int) -> dict[tuple[int, str], int]:
    """Return the peak of each phase; of micro-steps that repeat each other, the lowest.

    They allocate the same. What one holds more is what gloo's thread had not released yet.
    """
    found: dict[tuple[int, str], list[int]] = defaultdict(list)
    for window in steps:
        _, micro, phase = window["name"].split(".")
        repeats = 1 < int(micro) < last
        found[2 if repeats else int(micro), phase].append(window["peak_bytes"])
    # A phase that is entered twice is one stretch; a repeated one is several.
    return {key: min(peaks) if 1 < key[0] < last else max(peaks) for key, peaks in found.items()}


def _columns(phase: str, micro: int, last: int, layers: int) -> list[str]:
    if phase in ("optimizer_step", "after_optimizer_step"):
        return ["optimizer_step"]
    if phase == "after_micro_step":
        # DeepSpeed's step is over by then, and so is the last window of other engines' backward.
        return ["optimizer_step"] if micro == last else ["embedding_backward"]
    prefix = "later_" if micro > 1 else ""
    if phase.startswith("backward_"):
        number = int(phase.split("_")[1])
        ends = {layers: "backward_top", 0: "backward_bottom"}
        names = ["backward", *([ends[number]] if number in ends else [])]
    elif phase.startswith(("loss", "forward", "embedding_forward")):
        names = ["loss"] if phase.startswith("loss") else ["forward"]
    elif phase == "head_forward":
        names = ["forward_end"]
    else:
        names = [phase]
    return [prefix + name for name in names]


def read_rows(file: Path) -> dict[str, dict[str, str]]:
    """Return the rows written so far, by name."""
    if not file.exists():
        return {}
    with file.open(newline="") as text:
        return {row["name"]: row for row in csv.DictReader(text)}


def write_rows(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write all rows at once: a crash leaves the old file or the new one."""
    temporary = file.with_suffix(".tmp")
    with temporary.open("w", newline="") as text:
        writer = csv.DictWriter(
            text, COLUMNS, restval="", extrasaction="ignore", lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(rows)
    temporary.rename(file)
