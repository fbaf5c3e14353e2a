"""`autotune estimate`: memory and time of one configuration."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from autotune.cli.options import add_hardware_arguments, memory_limit_from

if TYPE_CHECKING:
    from autotune.planner import Estimate
    from autotune.spec.hardware import HardwareSpec
    from autotune.spec.model import ModelSpec
    from autotune.spec.workload import Workload


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the verb takes."""
    parser.add_argument("config", type=Path, metavar="CONFIG.yml", help="an Axolotl configuration")
    add_hardware_arguments(parser)
    parser.add_argument(
        "--json", action="store_true", help="one JSON document on stdout instead of tables"
    )


def run(args: argparse.Namespace) -> int:
    """Print the estimate; 2 when the configuration breaks a rule."""
    from autotune.config import load_config
    from autotune.planner import estimate_plan
    from autotune.spec.hardware import detect_hardware, load_hardware

    config = load_config(args.config)
    limit = memory_limit_from(args)
    hardware = (
        load_hardware(args.gpu_type, args.gpus, limit)
        if args.gpu_type
        else detect_hardware(args.gpus, "cuda", limit)
    )
    workload = config.workload_on(args.gpus)
    estimate = estimate_plan(config.model, workload, config.plan(args.gpus), hardware)
    if args.json:
        sys.stdout.write(json.dumps(estimate.to_dict(config.model), indent=1) + "\n")
    else:
        _print(config.model, workload, hardware, estimate)
    for violation in estimate.violations:
        sys.stderr.write(f"autotune: {violation}\n")
    return 2 if estimate.violations else 0


def _print(
    model: ModelSpec, workload: Workload, hardware: HardwareSpec, estimate: Estimate
) -> None:
    from autotune.cli.tables import (
        candidates_table,
        components_table,
        describe_workload,
        instants_table,
        make_console,
        time_table,
    )

    console = make_console()
    console.print(
        f"[bold]{model.name}[/] on {hardware.describe()}: {describe_workload(workload)}",
        highlight=False,
    )
    console.print(candidates_table([estimate], hardware, wide=console.width >= 100))
    console.print(components_table([estimate]))
    console.print(instants_table(estimate.memory))
    console.print(time_table(estimate))
    console.print(
        f"Predicted, not measured: {estimate.verdict} assumes an error of "
        f"{estimate.memory.relative_sigma:.0%} in memory.",
        highlight=False,
    )
