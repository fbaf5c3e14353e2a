"""How fast the command line answers: wall time of whole processes, imports included.

    python benchmarks/cli_speed.py [--runs 10] [--out benchmarks/results/cli_speed.csv]

The first run of each command warms the file cache and is not counted. Exits 1 where a median is
above its target.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "cli_speed.csv"
TARGETS_S = {
    ("--help",): 0.3,
    ("plan", "--model", "qwen3-8b", "--gpus", "8", "--gpu-type", "h100-sxm"): 1.5,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    slow = 0
    with args.out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["command", "runs", "median_s", "max_s", "target_s", "load_1min"])
        for words, target in TARGETS_S.items():
            seconds = [wall_s(words) for _ in range(args.runs + 1)][1:]
            median, largest = statistics.median(seconds), max(seconds)
            command = " ".join(["autotune", *words])
            load = os.getloadavg()[0]
            writer.writerow(
                [command, args.runs, f"{median:.4f}", f"{largest:.4f}", target, f"{load:.2f}"]
            )
            print(f"{median:.3f} s median, {largest:.3f} s max, target {target} s: {command}")
            slow += median > target
    return int(slow > 0)


def wall_s(words: tuple[str, ...]) -> float:
    """Run the installed command once; a failure is not a speed."""
    command = [str(Path(sys.executable).parent / "autotune"), *words]
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
