"""`capacity.csv`, and which files a capacity plan may overwrite."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path

from autotune.capacity import Cell
from autotune.errors import AutotuneError

CSV_FILE = "capacity.csv"
HTML_FILE = "capacity.html"
GENERATOR = "autotune capacity"
"""In the page's head: what marks a file as ours."""
_NUM_FIRST_COLUMNS = 6
"""Those every version began the file with."""
COLUMNS = (
    "gpu_type", "num_gpus", "num_nodes", "verdict", "fit_probability", "basis", "configuration",
    "tokens_per_s", "predicted_tokens_per_s", "memory_bytes", "predicted_memory_bytes",
    "device_memory_bytes", "missing_bytes", "days", "gpu_hours", "price_per_gpu_hour", "cost",
    "kwh", "meets_deadline", "tokens_in_budget", "within_budget", "tokens_in_deadline", "reason",
)  # fmt: skip


def check_targets(paths: Sequence[Path]) -> None:
    """Refuse paths that cannot be written, or that hold something other than a capacity plan.

    Raises:
        AutotuneError: nothing was written.
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise AutotuneError(f"{paths[0]} is given for two files. Give each its own path.")
    for path in paths:
        if path.is_dir():
            raise AutotuneError(f"{path} is a folder. Give the path of a file, or --out {path}.")
        if path.exists() and not _is_ours(path):
            raise AutotuneError(
                f"{path} exists and is no capacity plan; it was left as it is. Give another path, "
                "or remove it."
            )
        if not path.parent.is_dir():
            raise AutotuneError(f"{path} cannot be written: no folder {path.parent}. Make it.")


def _is_ours(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            head = file.read(4096)
    except OSError:
        return False
    return (
        not head
        or head.startswith(",".join(COLUMNS[:_NUM_FIRST_COLUMNS]))
        or f'content="{GENERATOR}"' in head
    )


def write_csv(cells: Sequence[Cell], path: Path) -> None:
    """Write one row a cell; what does not apply is an empty cell."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(cell.to_dict() for cell in cells)
    os.replace(temporary, path)
