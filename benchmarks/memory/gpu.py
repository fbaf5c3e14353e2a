"""Memory of Qwen3 on one CUDA GPU, predicted beside measured, up to the first that does not fit.

    python benchmarks/memory/gpu.py [--budget 20m] [--out DIR]

Runs the grid of `benchmarks/gpu_grid.py` (every engine, recomputation, LoRA, a ladder of micro
batches each) for several models and sequence lengths, short: memory is the same in every step.
Writes each grid to OUT/MODEL-SEQ/ and all rows to OUT/memory.csv, and prints the figures.
``--device cpu --settings tiny-qwen3:256`` runs the same script on a CPU rank.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import gpu_grid

from autotune.errors import AutotuneError
from autotune.spec.hardware import detect_hardware
from autotune.units import parse_duration_s

SETTINGS = (
    ("qwen3-0.6b", 1024),
    ("qwen3-4b", 4096),
    ("qwen3-1.7b", 16384),
    ("qwen3-8b", 2048),
    ("qwen3-0.6b", 32768),
    ("qwen3-4b", 1024),
    ("qwen3-8b", 8192),
)
"""Ordered so that a budget that ends early has seen short and long, small and large."""
SECONDS_A_RUNG = "0.1"


def main() -> int:
    args = parse_arguments()
    if args.device == "cuda" and not gpu_grid.cuda_gpu_present():
        print("No CUDA GPU here (nvidia-smi lists none): nothing to measure.")
        return 0
    out = args.out or gpu_grid.EXAMPLES / detect_hardware(1, args.device, None).gpu.name / "memory"
    ends = time.monotonic() + parse_duration_s(args.budget)
    for name, seq_len in args.settings:
        left = round(ends - time.monotonic())
        if left <= 0:
            print(f"{name} at {seq_len}: not run: the budget of {args.budget} was spent")
            continue
        options = ["--device", args.device, "--model", name, "--seq-len", str(seq_len)]
        options += ["--seconds", SECONDS_A_RUNG, "--budget", f"{left}s"]
        options += ["--out", str(out / f"{name}-{seq_len}")]
        if args.memory_limit:
            options += ["--memory-limit", args.memory_limit]
        gpu_grid.measure(gpu_grid.parse_arguments(options))
        rows = read_rows(out)
        write_rows(out / "memory.csv", rows)
    print_figures(figures(read_rows(out)))
    return 0


def read_rows(out: Path) -> list[dict[str, Any]]:
    """Return the rows of all grids, each with its model and sequence length."""
    rows = []
    for file in sorted(out.glob("*/grid.json")):
        grid = json.loads(file.read_text())
        about = {"model": grid["model"], "seq_len": grid["workload"]["seq_len"]}
        rows += [about | row for row in grid["rows"]]
    return rows


def write_rows(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the rows as CSV."""
    if not rows:
        return
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def figures(rows: Sequence[dict[str, Any]]) -> dict[str, float | int | None]:
    """Return the errors of what ran, and how many that ran out of memory were called `fits`."""
    errors = [row["memory_error"] for row in rows if row["memory_error"] is not None]
    ran_out = [row for row in rows if row["outcome"] == "oom"]
    return {
        "configurations": len(rows),
        "median_absolute_error": statistics.median(map(abs, errors)) if errors else None,
        "worst_under_prediction": -min(errors) if errors else None,
        "out_of_memory": len(ran_out),
        "out_of_memory_called_fits": sum(row["predicted_verdict"] == "fits" for row in ran_out),
    }


def print_figures(found: dict[str, float | int | None]) -> None:
    """Print a line a figure."""
    for name, value in found.items():
        shown = "-" if value is None else f"{value:.1%}" if isinstance(value, float) else value
        print(f"{name.replace('_', ' ')}: {shown}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--settings", type=_settings, default=SETTINGS, help="such as qwen3-4b:4096,qwen3-8b:2048"
    )
    parser.add_argument("--memory-limit", help="such as 40GiB (default: all of the memory)")
    parser.add_argument("--budget", default="20m", help="start no launch after this time")
    parser.add_argument("--out", type=Path, help="default: reports/examples/GPU/memory")
    return parser.parse_args()


def _settings(text: str) -> tuple[tuple[str, int], ...]:
    pairs = [part.partition(":") for part in text.split(",")]
    try:
        return tuple((name, int(seq_len)) for name, _, seq_len in pairs)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} is not MODEL:SEQ_LEN,...") from error


if __name__ == "__main__":
    try:
        sys.exit(main())
    except AutotuneError as error:
        print(f"gpu: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
