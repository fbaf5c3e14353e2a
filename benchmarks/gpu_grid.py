"""Measure a grid of configurations on one device and lay the predictions beside the measurements.

    python benchmarks/gpu_grid.py [--model qwen3-1.7b] [--out DIR] [--budget 20m]

One rank, real engines: DDP, ZeRO-1/2/3 and FSDP2 with and without recomputation, LoRA, each with a
ladder of micro batches up to the first that does not fit. One GPU is enough; on one rank nothing is
sharded and no collective moves data, so this checks memory per component, compute and optimizer
time, not communication. ``--device cpu`` runs the same script on a CPU rank.

Writes grid.csv (a row a configuration, failures included) and grid.json (the same, with
environment, what was skipped and the errors) after every launch.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from grid_report import print_errors, row_of, summarise, write_outputs

from autotune.errors import AutotuneError, NothingFitsError
from autotune.plan import Engine, Recompute
from autotune.planner import enumerate_plans, estimate_plan
from autotune.search.space import Family, make_families
from autotune.spec.hardware import HardwareSpec, detect_hardware
from autotune.spec.model import ModelSpec, load_model
from autotune.spec.strategy import load_strategies
from autotune.spec.workload import Lora, Workload
from autotune.trial.launch import Ended, Limits, run_launch
from autotune.trial.native_ops import build_native_ops
from autotune.trial.outcome import read_rungs
from autotune.trial.protocol import Measurement, ModelSource, Request, Rung
from autotune.units import format_bytes, format_duration, parse_bytes, parse_duration_s

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
LORA_STRATEGIES = ("ddp", "zero2", "fsdp2")
MODELS = ("qwen3-4b", "qwen3-1.7b", "qwen3-0.6b")
# fp32 weights, gradients and two Adam moments, and a bf16 copy with its gradient.
STATE_BYTES_PER_PARAMETER = 20
STATES_SHARE = 0.25
"""Default model: the largest whose states leave the ladder three quarters of the memory."""
EXAMPLES = Path("reports/examples")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One launch of the grid."""

    strategy: str
    recompute: Recompute
    adapter: Lora | None = None

    @property
    def name(self) -> str:
        parts = [self.strategy, "lora" if self.adapter else "", self.recompute]
        return "-".join(part for part in parts if part and part != Recompute.NONE)


@dataclass(kw_only=True, slots=True)
class Grid:
    """What the run is about and what it has found so far."""

    model: ModelSpec
    workload: Workload
    hardware: HardwareSpec
    device: Literal["cuda", "cpu"]
    measurement: Measurement
    memory_limit_bytes: int | None
    launches: Path
    launch_timeout_s: float
    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    def skip(self, cell: Cell, reason: str) -> None:
        self.skipped.append({"configuration": cell.name, "reason": reason})
        print(f"{cell.name}: not run: {reason}", flush=True)


def main() -> int:
    args = parse_arguments()
    if args.device == "cuda" and not cuda_gpu_present():
        print("No CUDA GPU here (nvidia-smi lists none): nothing to measure.")
        return 0
    try:
        return measure(args)
    except AutotuneError as error:
        print(f"gpu_grid: {error}", file=sys.stderr)
        return error.exit_code


def measure(args: argparse.Namespace) -> int:
    grid = make_grid(args)
    default = EXAMPLES / grid.hardware.gpu.name if args.device == "cuda" else grid.launches
    out = args.out or default
    out.mkdir(parents=True, exist_ok=True)
    print(
        f"{grid.model.name} on {grid.hardware.describe()}, sequence {grid.workload.seq_len}, "
        f"global batch {grid.workload.global_batch_size}; writing to {out}",
        flush=True,
    )
    started = time.monotonic()
    budget_s = parse_duration_s(args.budget) if args.budget else None
    for cell in cells(args.strategies, args.only):
        if budget_s is not None and time.monotonic() - started > budget_s:
            grid.skip(cell, f"the budget of {args.budget} was spent")
        else:
            run_cell(grid, cell)
        write_outputs(out, document(grid, time.monotonic() - started))
    print_errors(summarise(grid.rows))
    return 0 if any(row["outcome"] == "ok" for row in grid.rows) else 1


def make_grid(args: argparse.Namespace) -> Grid:
    limit = parse_bytes(args.memory_limit) if args.memory_limit else None
    hardware = detect_hardware(1, args.device, limit)
    model = load_model(args.model or default_model(hardware))
    return Grid(
        model=model,
        workload=Workload(
            seq_len=args.seq_len, global_batch_size=args.global_batch_size, packing=args.packing
        ),
        hardware=hardware,
        device=args.device,
        measurement=Measurement(target_seconds=args.seconds),
        memory_limit_bytes=limit,
        launches=Path("reports") / f"grid-{hardware.gpu.name}-{time.strftime('%Y%m%d-%H%M%S')}",
        launch_timeout_s=parse_duration_s(args.launch_timeout),
    )


def default_model(hardware: HardwareSpec) -> str:
    for name in MODELS:
        states = load_model(name).num_parameters * STATE_BYTES_PER_PARAMETER
        if states <= STATES_SHARE * hardware.gpu.memory_bytes:
            return name
    return "tiny-qwen3" if hardware.gpu.is_cpu else MODELS[-1]


def cells(strategies: Sequence[str], only: Sequence[str] | None) -> list[Cell]:
    """Return the grid, ordered so that a budget that ends early has seen every engine first."""
    grid = [Cell(strategy=name, recompute=mode) for mode in Recompute for name in strategies]
    grid += [
        Cell(strategy=name, recompute=Recompute.NONE, adapter=Lora())
        for name in strategies
        if name in LORA_STRATEGIES
    ]
    unknown = sorted(set(only or ()) - {cell.name for cell in grid})
    if unknown:
        raise AutotuneError(
            f"--only {','.join(unknown)}: not in the grid. "
            f"Known: {', '.join(cell.name for cell in grid)}."
        )
    return [cell for cell in grid if only is None or cell.name in only]


def run_cell(grid: Grid, cell: Cell) -> None:
    """Launch one configuration's ladder and add its rows."""
    workload = grid.workload.model_copy(update={"adapter": cell.adapter})
    family, refused = family_of(grid, cell, workload)
    if family is None:
        grid.skip(cell, refused)
        return
    lacks = missing_package(family, cell)
    if lacks:
        grid.skip(cell, f"{lacks} is not installed")
        return
    folder = (grid.launches / f"{len(grid.rows):03d}-{cell.name}").resolve()
    request = make_request(grid, family, workload, folder)
    try:
        build_native_ops(request, folder)
    except NothingFitsError as error:
        grid.skip(cell, str(error))
        return
    limits = Limits(deadline_s=grid.launch_timeout_s, hang_s=grid.launch_timeout_s / 2)
    ended = run_launch(request, folder, limits)
    grid.versions = ended.results[0].versions or grid.versions
    for record in read_rungs(request, ended.results, ended.outcome, ended.message):
        estimate = family.rung(record.plan_object.micro_batch_size)
        row = row_of(record, estimate, grid.device, cell.adapter is not None, baseline(ended))
        row["device_used_bytes"] = device_used(ended, record.plan_object.micro_batch_size)
        grid.rows.append(row)
        print(describe(row), flush=True)
    if ended.outcome not in ("ok", "oom"):
        print(f"{cell.name}: {ended.outcome}: {ended.message} (logs in {folder})", flush=True)


def family_of(grid: Grid, cell: Cell, workload: Workload) -> tuple[Family | None, str]:
    """Return the ladder of a cell, or why there is none."""
    estimates = [
        estimate_plan(grid.model, workload, plan, grid.hardware)
        for plan in enumerate_plans(
            grid.model,
            workload,
            grid.hardware,
            load_strategies([cell.strategy]),
            cp_degrees=(1,),
            recompute=(cell.recompute,),
        )
    ]
    broken = [violation for estimate in estimates for violation in estimate.violations]
    if broken:
        return None, str(broken[0])
    families, left_out = make_families(estimates)
    return (families[0], "") if families else (None, left_out[0]["reason"])


def missing_package(family: Family, cell: Cell) -> str | None:
    needed = {"deepspeed"} if family.ladder[0].plan.engine is Engine.DEEPSPEED else set()
    needed |= {"peft"} if cell.adapter else set()
    return next((name for name in sorted(needed) if importlib.util.find_spec(name) is None), None)


def make_request(grid: Grid, family: Family, workload: Workload, folder: Path) -> Request:
    plans = [estimate.plan for estimate in family.ladder]
    return Request(
        launch_id=folder.name,
        mode="trial",
        model=ModelSource(name=grid.model.name, config=grid.model.hf_config),
        plan=plans[0].to_dict(),
        workload=workload,
        device=grid.device,
        out_dir=str(folder),
        rungs=[
            Rung(micro_batch_size=p.micro_batch_size, grad_accum_steps=p.grad_accum_steps)
            for p in plans
        ],
        measurement=grid.measurement,
        memory_limit_bytes=grid.memory_limit_bytes,
    )


def baseline(ended: Ended) -> int:
    return max((result.baseline_bytes for result in ended.results), default=0)


def device_used(ended: Ended, micro_batch_size: int) -> int | None:
    """Return what a rung took of the whole device, as NVML counts it; None on CPU."""
    rungs = [rung for result in ended.results for rung in result.rungs]
    parts = [p for r in rungs if r.micro_batch_size == micro_batch_size for p in r.accumulations]
    used = [part.device_used_bytes for part in parts if part.device_used_bytes is not None]
    return max(used, default=None)


def describe(row: dict[str, Any]) -> str:
    lora = " lora" if row["adapter"] else ""
    name = f"{row['strategy']}{lora} {row['recompute']:<4} mbs {row['micro_batch_size']:>3}"
    if row["outcome"] != "ok":
        return f"{name}  {row['outcome']}: {row['message'].splitlines()[0][:100]}"
    return (
        f"{name}  {format_bytes(row['measured_bytes']):>10} (predicted "
        f"{format_bytes(row['predicted_bytes'])}, {row['memory_error']:+.0%})  "
        f"{format_duration(row['step_s'])} a step (predicted "
        f"{format_duration(row['predicted_step_s'])}, {row['time_error']:+.0%})"
    )


def document(grid: Grid, elapsed_s: float) -> dict[str, Any]:
    return {
        "model": grid.model.name,
        "num_parameters": grid.model.num_parameters,
        "workload": grid.workload.model_dump(mode="json"),
        "device": grid.device,
        "gpu": grid.hardware.gpu.name,
        "memory_bytes": grid.hardware.gpu.memory_bytes,
        "memory_limit_bytes": grid.memory_limit_bytes,
        "versions": grid.versions,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "elapsed_s": elapsed_s,
        "errors": summarise(grid.rows),
        "skipped": grid.skipped,
        "rows": grid.rows,
    }


def commit() -> str | None:
    """Return the commit that was measured, marked when the tree had changes."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def cuda_gpu_present() -> bool:
    """Ask nvidia-smi, which needs no CUDA context."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and "GPU " in done.stdout


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--model", help="default: by the memory of the GPU")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--global-batch-size", type=int, default=16)
    parser.add_argument("--packing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--strategies", type=lambda text: text.split(","), default=STRATEGIES)
    parser.add_argument(
        "--only", type=lambda text: text.split(","), help="launches, such as fsdp2,zero2-full"
    )
    parser.add_argument("--memory-limit", help="such as 40GiB (default: all of the memory)")
    parser.add_argument("--seconds", type=float, default=4.0, help="counted seconds a rung")
    parser.add_argument("--launch-timeout", default="10m")
    parser.add_argument("--budget", help="start no launch after this time, such as 20m")
    parser.add_argument("--out", type=Path, help="default: reports/examples/GPU")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
