"""What `autotune search` takes."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from autotune.cli.data import add_data_arguments
from autotune.cli.nodes import add_node_arguments
from autotune.cli.options import (
    add_knowledge_argument,
    add_model_argument,
    add_workload_arguments,
    positive_int,
    seed_number,
    whole_number,
)
from autotune.cli.space import add_space_arguments
from autotune.cli.start import add_start_arguments
from autotune.search.names import DEFAULT_SAMPLER, FINALISTS, SAMPLERS, TOLERANCE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the verb takes."""
    add_model_argument(parser, required=False)
    parser.add_argument(
        "--gpus", type=positive_int, metavar="N", help="number of GPUs (ranks); --from may say it"
    )
    parser.add_argument(
        "--device",
        choices=["cuda", "cpu"],
        default="cuda",
        help="cpu measures on CPU processes instead of GPUs (default: %(default)s)",
    )
    parser.add_argument(
        "--memory-limit",
        metavar="SIZE",
        help="memory a rank may use, enforced, such as 600MiB or 40GiB (default: all of it)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="study folder; the same command in it resumes (default: reports/MODEL-Ngpu)",
    )
    add_start_arguments(parser)
    add_workload_arguments(parser)
    add_data_arguments(parser)
    add_knowledge_argument(parser)
    add_space_arguments(parser)
    effort = parser.add_argument_group("effort")
    effort.add_argument(
        "--trials",
        type=positive_int,
        metavar="N",
        help="launches at most; each measures a ladder of micro batches (default: no limit)",
    )
    effort.add_argument("--budget", metavar="TIME", help="such as 20m (default: no limit)")
    effort.add_argument(
        "--trial-timeout", metavar="TIME", help="deadline of a launch (default: from prediction)"
    )
    effort.add_argument(
        "--sampler",
        choices=SAMPLERS,
        default=DEFAULT_SAMPLER,
        help="what chooses the next configuration (default: %(default)s)",
    )
    effort.add_argument(
        "--tolerance",
        type=percentage,
        default=TOLERANCE,
        metavar="PERCENT",
        help="cost-model stops when nothing left is likely to be faster by more (default: 2%%)",
    )
    effort.add_argument(
        "--confirm",
        type=whole_number,
        default=FINALISTS,
        metavar="N",
        help="finalists measured again, each freshly forked; 0 for none (default: %(default)s)",
    )
    effort.add_argument(
        "--parallel",
        type=positive_int,
        metavar="N",
        help="launches at once, on disjoint devices (default: as many as there are GPUs for; 1 on "
        "cpu)",
    )
    effort.add_argument("--seed", type=seed_number, default=42, help="default: %(default)s")
    add_node_arguments(parser)
    parser.add_argument(
        "--json", action="store_true", help="one JSON document on stdout instead of a table"
    )


def percentage(text: str) -> float:
    """Read a percentage, with or without its sign, as a share."""
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = math.nan
    if not 0 <= value < 100:
        raise argparse.ArgumentTypeError(f"{text!r}: a percentage from 0 to below 100 is needed")
    return value / 100
