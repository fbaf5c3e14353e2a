"""`autotune import`: another tool's configuration as one that `estimate` and `train` read."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from autotune.cli.export import add_output_arguments
from autotune.cli.options import positive_int

if TYPE_CHECKING:
    from autotune.config.foreign import StartingPoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the verb takes."""
    parser.add_argument(
        "config",
        type=Path,
        metavar="FILE",
        help="accelerate's config file, a DeepSpeed JSON or an Axolotl configuration",
    )
    parser.add_argument(
        "--gpus", type=positive_int, metavar="N", help="ranks (default: what the file says)"
    )
    add_starting_point_arguments(parser)
    add_output_arguments(parser, "the configuration")


def add_starting_point_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what an accelerate or DeepSpeed file leaves open."""
    group = parser.add_argument_group("what the file leaves open, or to read it with")
    group.add_argument(
        "--model",
        metavar="NAME",
        help="needed for accelerate and DeepSpeed files: a catalogue name, a Hub id, a folder",
    )
    group.add_argument("--seq-len", type=positive_int, metavar="TOKENS")
    group.add_argument("--micro-batch-size", type=positive_int, metavar="N")
    group.add_argument("--grad-accum-steps", type=positive_int, metavar="N")
    group.add_argument(
        "--recompute", choices=["none", "full"], help="activation checkpointing of every layer"
    )
    group.add_argument(
        "--sequence-parallel-by",
        choices=["ulysses", "ring"],
        help="how sequences are split where they are (default: as an Axolotl file's keys say; "
        "ulysses for the others, and ring for degrees that do not divide the heads)",
    )


def starting_point_from(args: argparse.Namespace) -> StartingPoint:
    """Build what the flags say."""
    from autotune.config.foreign import StartingPoint
    from autotune.plan import CpBackend

    by = args.sequence_parallel_by
    return StartingPoint(
        model=args.model,
        num_gpus=args.gpus,
        sequence_len=args.seq_len,
        micro_batch_size=args.micro_batch_size,
        grad_accum_steps=args.grad_accum_steps,
        gradient_checkpointing=None if args.recompute is None else args.recompute == "full",
        sequence_parallel_by=CpBackend(by) if by else None,
    )


def run(args: argparse.Namespace) -> int:
    """Write the configuration in Axolotl's keys."""
    from autotune.cli.files import write_files
    from autotune.config.foreign import load_any
    from autotune.emit.run_config import emit_run_config

    loaded = load_any(args.config, starting_point_from(args))
    text = emit_run_config(loaded.config)
    sys.stderr.write(f"{args.config}: read as {loaded.kind} configuration\n")
    states = write_files({args.out: text}, force=args.force) if args.out else []
    if args.json:
        plan = loaded.config.plan(loaded.num_gpus).to_dict() if loaded.num_gpus else None
        document = {
            "format": str(loaded.kind),
            "num_gpus": loaded.num_gpus,
            "plan": plan,
            "config": text,
            "written": {str(path): state for path, state in states},
            "warnings": [*loaded.warnings, *loaded.config.warnings],
        }
        sys.stdout.write(json.dumps(document, indent=1) + "\n")
    elif args.out:
        sys.stderr.write(f"{args.out}: {states[0][1]}\n")
    else:
        sys.stdout.write(text)
    return 0
