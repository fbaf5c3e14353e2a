"""How fast a space is ranked: 100,000 plans, their memory, their times, their order.

    python benchmarks/time/speed.py [--runs 5] [--out benchmarks/results/time_speed.csv]

Exits 1 where the median is above its target. Formula and measured tables are timed apart: a
calibration is looked up by size and group. CPU seconds far below the median: something else was at
work.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from autotune.memory import estimate_memory_table
from autotune.memory.columns import PlanColumns
from autotune.memory.knowledge import model_key
from autotune.memory.layers import Regime
from autotune.memory.residuals import Residuals, Ruler
from autotune.memory.verdict import judge_table
from autotune.plan import Plan, Recompute
from autotune.planner import CP_DEGREES, best_first_index, make_plan
from autotune.rules import check_plan
from autotune.spec.hardware import HardwareSpec, load_hardware
from autotune.spec.model import ModelSpec, load_model
from autotune.spec.strategy import load_strategies
from autotune.spec.workload import Precision, Workload
from autotune.timing import Calibration, Collective, estimate_time_table
from autotune.timing.calibration import CollectiveCurve, MatmulPoint, ModelTimes, PassPoint

RESULTS = Path(__file__).parents[1] / "results" / "time_speed.csv"
PLANS = 100_000
TARGET_S = 2.0
MODEL = "qwen3-8b"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    model, workload, hardware = load_model(MODEL), Workload(), load_hardware("h100-sxm", 8)
    columns = plans_of(model, workload, hardware)
    estimate_memory_table(model, workload, [columns.plan(0)], hardware)  # reads the profiles
    cases: list[tuple[str, Calibration | None]] = [
        (f"rank {PLANS:,} plans of {MODEL}", None),
        ("the same with measured tables", table_of(model)),
    ]
    slow = 0
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["what", "runs", "median_s", "max_s", "cpu_s", "target_s", "load_1min"])
        for what, calibration in cases:
            run = ranker(model, workload, columns, hardware, calibration)
            before = time.process_time()
            seconds = [run() for _ in range(args.runs)]
            used = (time.process_time() - before) / args.runs
            median, largest = statistics.median(seconds), max(seconds)
            writer.writerow(
                [what, args.runs, f"{median:.3f}", f"{largest:.3f}", f"{used:.3f}", TARGET_S,
                 f"{os.getloadavg()[0]:.2f}"]
            )  # fmt: skip
            said = "pass" if median <= TARGET_S else "short"
            print(
                f"{said}: {median:.2f} s median, {largest:.2f} s max, {used:.2f} s of CPU, target "
                f"{TARGET_S} s: {what}"
            )
            slow += median > TARGET_S
    return int(slow > 0)


def ranker(
    model: ModelSpec,
    workload: Workload,
    columns: PlanColumns,
    hardware: HardwareSpec,
    calibration: Calibration | None,
) -> Callable[[], float]:
    """Return a function that ranks the plans once and says how long it took."""

    def run() -> float:
        start = time.perf_counter()
        table = estimate_memory_table(model, workload, columns, hardware)
        judged = judge_table(table, hardware, Residuals.known(Ruler.CUDA), model_key(model))
        times = estimate_time_table(model, workload, columns, hardware, calibration)
        order = best_first_index(judged, times)
        shown = [(columns.plan(int(i)), judged.peak(int(i)), times.estimate(i)) for i in order[:10]]
        seconds = time.perf_counter() - start
        assert len(order) == PLANS and len(shown) == 10
        return seconds

    return run


def plans_of(model: ModelSpec, workload: Workload, hardware: HardwareSpec) -> PlanColumns:
    """Return the plans: every legal layout with many splits of the batch."""
    layouts = [plan for plan in _layouts(workload, hardware)
               if not check_plan(plan, model, workload, hardware)]  # fmt: skip
    each = -(-PLANS // len(layouts))
    side = int(each**0.5) + 1
    parts, left = [], PLANS
    for plan in layouts:
        numbers = PlanColumns.of([plan]).numbers.repeat(min(each, left), axis=0)
        for row in range(len(numbers)):
            numbers[row, 0], numbers[row, 1] = row // side + 1, row % side + 1
        parts.append((plan, numbers))
        left -= len(numbers)
    return PlanColumns.joined(parts)


def _layouts(workload: Workload, hardware: HardwareSpec) -> list[Plan]:
    return [
        make_plan(
            strategy, hardware, cp=cp, recompute=recompute,
            grad_accum_steps=workload.global_batch_size * cp // hardware.num_gpus,
        )
        for strategy in load_strategies()
        for cp in CP_DEGREES
        for recompute in Recompute
    ]  # fmt: skip


def table_of(model: ModelSpec) -> Calibration:
    """Return a calibration as large as a sweep's; its numbers are made up, only its size counts."""
    sizes = tuple(4.0**power for power in range(6, 15))
    curves = tuple(
        CollectiveCurve(
            kind=kind, ranks=ranks, num_bytes=sizes, times_s=tuple(1e-5 + s / 1e11 for s in sizes)
        )
        for kind in Collective
        for ranks in (2, 4, 8)
    )
    points = tuple(
        MatmulPoint(precision=Precision.BF16, rows=2**r, inputs=i, outputs=o, seconds=1e-3)
        for r in range(6, 15)
        for i, o in ((4096, 4096), (4096, 12288), (12288, 4096), (4096, 151936))
    )
    passes = tuple(
        PassPoint(
            layers=layers, micro_batch_size=batch, seq_len=2048, forward_s=1e-3 * layers * batch,
            backward_s=2e-3 * layers * batch, recompute_backward_s=3e-3 * layers * batch,
        )
        for layers in (2, 4)
        for batch in (1, 2, 4, 8)
    )  # fmt: skip
    return Calibration(
        device="cuda", num_ranks=8, threads=1, fingerprint={}, recorded_at="", duration_s=60,
        collectives=curves, matmuls=points,
        models=(ModelTimes(model=model_key(model), regime=Regime.COMPUTE, packing=True,
                           points=passes),),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
