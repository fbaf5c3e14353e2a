"""`capacity.csv`, and what the files of a capacity plan are called."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from autotune.capacity import Cell
from autotune.report.files import write_whole

CSV_FILE = "capacity.csv"
HTML_FILE = "capacity.html"
GENERATOR = "autotune capacity"
"""In the page's head: what marks a file as ours."""
COLUMNS = (
    "gpu_type", "num_gpus", "num_nodes", "verdict", "fit_probability", "basis", "configuration",
    "tokens_per_s", "predicted_tokens_per_s", "memory_bytes", "predicted_memory_bytes",
    "device_memory_bytes", "missing_bytes", "days", "gpu_hours", "price_per_gpu_hour", "cost",
    "kwh", "meets_deadline", "tokens_in_budget", "within_budget", "tokens_in_deadline", "reason",
)  # fmt: skip
CSV_MARK = ",".join(COLUMNS[:6])
"""How every version's header began."""


def write_csv(cells: Sequence[Cell], path: Path) -> None:
    """Write one row a cell; what does not apply is an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(cell.to_dict() for cell in cells)
    write_whole(path, text.getvalue())
