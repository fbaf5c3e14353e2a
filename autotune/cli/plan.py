"""`autotune plan`: rank configurations by prediction."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

from autotune.cli.options import (
    add_hardware_arguments,
    add_knowledge_argument,
    add_model_argument,
    add_workload_arguments,
    memory_limit_from,
    positive_int,
    use_knowledge,
    workload_from,
)
from autotune.cli.space import add_space_arguments, space_from

if TYPE_CHECKING:
    from autotune.planner import Ranking
    from autotune.spec.hardware import HardwareSpec
    from autotune.spec.model import ModelSpec
    from autotune.spec.workload import Workload

_DEFAULT_TOP = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the verb takes."""
    add_model_argument(parser)
    add_hardware_arguments(parser)
    add_workload_arguments(parser)
    add_knowledge_argument(parser)
    add_space_arguments(parser)
    parser.add_argument(
        "--top",
        type=positive_int,
        metavar="N",
        help=f"configurations shown (default: {_DEFAULT_TOP}; with --json all)",
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON document on stdout instead of tables"
    )


def run(args: argparse.Namespace) -> int:
    """Print the ranking; where nothing fits, the document alone, and why."""
    from autotune.calibrate.store import calibration_for
    from autotune.errors import NothingFitsError
    from autotune.memory.knowledge import residuals_for
    from autotune.memory.verdict import Verdict
    from autotune.planner import estimate_space, nothing_fits
    from autotune.spec.hardware import detect_hardware, load_hardware
    from autotune.spec.model import load_model
    from autotune.spec.strategy import load_strategies

    limit = memory_limit_from(args)
    model = load_model(args.model, any_family=True)
    hardware = (
        load_hardware(args.gpu_type, args.gpus, limit)
        if args.gpu_type
        else detect_hardware(args.gpus, "cuda", limit)
    )
    workload = workload_from(args, model)
    use_knowledge(args)
    ranking = estimate_space(
        model,
        workload,
        hardware,
        load_strategies(args.strategies),
        **space_from(args),
        residuals=residuals_for(hardware),
        calibration=None if args.no_knowledge else calibration_for(hardware),
    )
    fits = ranking.candidates[0].verdict is not Verdict.OOM
    if args.json:
        document = _document(model, workload, hardware, ranking, args.top)
        sys.stdout.write(json.dumps(document, indent=1) + "\n")
    elif fits:
        _print(model, workload, hardware, ranking, args.top or _DEFAULT_TOP)
    if not fits:
        raise NothingFitsError(nothing_fits(model, hardware, ranking.candidates))
    return 0


def _document(
    model: ModelSpec,
    workload: Workload,
    hardware: HardwareSpec,
    ranking: Ranking,
    top: int | None,
) -> dict[str, Any]:
    return {
        "model": model.name,
        "hardware": {
            "gpu": hardware.gpu.name,
            "num_gpus": hardware.num_gpus,
            "gpus_per_node": hardware.gpus_per_node,
            "num_nodes": hardware.num_nodes,
            "memory_bytes": hardware.gpu.memory_bytes,
            "source": hardware.gpu.source,
        },
        "workload": workload.model_dump(mode="json"),
        "candidates": [estimate.to_dict(model) for estimate in ranking.candidates[:top]],
        "rejected": [
            {"plan": r.plan.to_dict(), "code": r.code, "reason": r.reason} for r in ranking.rejected
        ],
        "space_size": ranking.space_size,
        "elapsed_s": ranking.elapsed_s,
    }


def _print(
    model: ModelSpec, workload: Workload, hardware: HardwareSpec, ranking: Ranking, top: int
) -> None:
    from autotune.cli.tables import (
        candidates_table,
        components_table,
        describe_workload,
        error_words,
        format_count,
        make_console,
    )
    from autotune.planner import refusal_lines

    console = make_console()
    console.print(
        f"[bold]{model.name}[/] ({format_count(model.num_parameters)} parameters) on "
        f"{hardware.describe()}: {describe_workload(workload)}",
        highlight=False,
    )
    shown = ranking.candidates[:top]
    console.print(candidates_table(shown, hardware, wide=console.width >= 100))
    console.print(components_table(shown[: 3 if console.width < 100 else 5]))
    verdicts = Counter(str(estimate.verdict) for estimate in ranking.candidates)
    counts = ", ".join(f"{count} {name}" for name, count in sorted(verdicts.items()))
    console.print(
        f"{ranking.space_size} configurations in {ranking.elapsed_s:.2f} s: {counts}, "
        f"{len(ranking.rejected)} refused by a rule.",
        highlight=False,
    )
    for line in refusal_lines((refused.code, refused.reason) for refused in ranking.rejected):
        console.print(f"  {line}", highlight=False, markup=False)
    console.print(
        f"{error_words(shown[0].memory)} Times rank. 'autotune search' measures both.",
        highlight=False,
    )
