"""`autotune estimate`: memory and time of one configuration."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from autotune.cli.import_ import add_starting_point_arguments, starting_point_from
from autotune.cli.options import (
    add_hardware_arguments,
    add_knowledge_argument,
    memory_limit_from,
    use_knowledge,
)
from autotune.errors import AutotuneError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autotune.memory import MemoryEstimate
    from autotune.memory.advice import Advice
    from autotune.plan import Plan
    from autotune.planner import Estimate
    from autotune.spec.hardware import HardwareSpec
    from autotune.spec.model import ModelSpec
    from autotune.spec.workload import Workload


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the verb takes."""
    parser.add_argument(
        "config",
        nargs="?",
        type=Path,
        metavar="CONFIG.yml",
        help="an Axolotl configuration; or, with --model, accelerate's or a DeepSpeed JSON",
    )
    parser.add_argument(
        "--from", dest="start", type=Path, metavar="CONFIG", help="the same, as search says it"
    )
    add_hardware_arguments(parser)
    add_starting_point_arguments(parser)
    add_knowledge_argument(parser)
    parser.add_argument(
        "--json", action="store_true", help="one JSON document on stdout instead of tables"
    )


def run(args: argparse.Namespace) -> int:
    """Print the estimate; 2 when the configuration breaks a rule."""
    from autotune.calibrate.store import calibration_for
    from autotune.config.foreign import FileKind, load_any
    from autotune.memory.advice import advise, legal_changes, profiles_needed
    from autotune.memory.knowledge import residuals_for
    from autotune.memory.tensor_parallel import rank_profiles
    from autotune.planner import estimate_plan, predict_memory
    from autotune.spec.hardware import detect_hardware, load_hardware
    from autotune.tensor_rules import tensor_parallel_splits

    path = _config_path(args)
    loaded = load_any(path, starting_point_from(args), any_family=True)
    if loaded.kind is not FileKind.AXOLOTL:
        sys.stderr.write(f"{path}: read as {loaded.kind} configuration\n")
    config = loaded.config
    limit = memory_limit_from(args)
    hardware = (
        load_hardware(args.gpu_type, args.gpus, limit)
        if args.gpu_type
        else detect_hardware(args.gpus, "cuda", limit)
    )
    use_knowledge(args)
    residuals = residuals_for(hardware)
    model, workload, plan = config.model, config.workload_on(args.gpus), config.plan(args.gpus)
    if unsplit := tensor_parallel_splits(plan, model, workload):
        # There is no part of the model to estimate.
        raise AutotuneError(f"{path}: [AT115] {' '.join(unsplit)}")
    changes = legal_changes(model, workload, plan, hardware)
    needed = profiles_needed(model, workload, plan, changes, hardware)
    rank_profiles(model, needed, plan.tp)
    calibration = None if args.no_knowledge else calibration_for(hardware)
    estimate = estimate_plan(model, workload, plan, hardware, residuals, calibration)

    def memory_of(workload: Workload, plan: Plan) -> MemoryEstimate:
        return predict_memory(model, workload, plan, hardware, residuals)

    advice = advise(estimate.memory, changes, hardware, memory_of)
    if args.json:
        document = estimate.to_dict(model) | {"advice": [each.to_dict() for each in advice]}
        sys.stdout.write(json.dumps(document, indent=1) + "\n")
    else:
        _print(model, workload, hardware, estimate, advice)
    for violation in estimate.violations:
        sys.stderr.write(f"autotune: {violation}\n")
    return 2 if estimate.violations else 0


def _config_path(args: argparse.Namespace) -> Path:
    given = [path for path in (args.config, args.start) if path is not None]
    if len(given) != 1:
        raise AutotuneError(
            "estimate takes one configuration: autotune estimate CONFIG.yml, or --from CONFIG.yml."
        )
    return Path(given[0])


def _print(
    model: ModelSpec,
    workload: Workload,
    hardware: HardwareSpec,
    estimate: Estimate,
    advice: Sequence[Advice],
) -> None:
    from autotune.cli.breakdown import print_memory
    from autotune.cli.tables import describe_workload, make_console, time_table
    from autotune.units import format_duration

    console = make_console()
    console.print(
        f"[bold]{model.name}[/] on {hardware.describe()}: {estimate.plan.describe()}, "
        f"{describe_workload(workload)}",
        highlight=False,
    )
    print_memory(console, estimate, hardware, advice)
    console.print(time_table(estimate))
    time = estimate.time
    console.print(
        f"{time.tokens_per_s:,.0f} tokens/s, a step of {format_duration(time.step_s)}, MFU "
        f"{time.mfu:.0%}: predicted, not measured.",
        highlight=False,
    )
