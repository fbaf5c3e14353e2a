"""The flags that span a space of plans: `search` measures it, `plan` predicts it."""

from __future__ import annotations

import argparse
from enum import StrEnum
from typing import TypedDict, TypeVar

from autotune.cli.options import (
    add_tensor_parallel_argument,
    comma_list,
    integers,
    tensor_parallel_from,
)
from autotune.errors import AutotuneError
from autotune.plan import CpBackend, Recompute

Word = TypeVar("Word", bound=StrEnum)


class Space(TypedDict):
    """What `autotune.planner.estimate_space` takes besides the strategies."""

    micro_batches: list[int] | None
    cp_degrees: list[int]
    cp_backends: list[CpBackend] | None
    tp_degrees: list[int]
    recompute: list[Recompute]


def add_space_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--strategies`` and what each of them is combined with."""
    space = parser.add_argument_group("space")
    space.add_argument(
        "--strategies",
        type=comma_list,
        metavar="A,B",
        help="names or YAML files (default: all that ship)",
    )
    space.add_argument(
        "--micro-batches", type=comma_list, metavar="1,2,4", help="default: powers of two"
    )
    space.add_argument(
        "--sequence-parallel", type=comma_list, metavar="1,2", help="degrees (default: 1,2,4)"
    )
    space.add_argument(
        "--sequence-parallel-by",
        type=comma_list,
        metavar="ulysses,ring",
        help="how (default: ulysses, and ring for degrees that do not divide the heads)",
    )
    add_tensor_parallel_argument(space)
    space.add_argument(
        "--recompute",
        type=comma_list,
        metavar="none,full",
        help="activation checkpointing modes (default: none,full)",
    )


def space_from(args: argparse.Namespace) -> Space:
    """Read the flags, but for ``--strategies``.

    Raises:
        AutotuneError: a value no flag of the space knows.
    """
    from autotune.planner.layouts import CP_DEGREES

    return Space(
        micro_batches=integers(args.micro_batches, "--micro-batches"),
        cp_degrees=integers(args.sequence_parallel, "--sequence-parallel") or list(CP_DEGREES),
        cp_backends=_named(CpBackend, args.sequence_parallel_by, "--sequence-parallel-by"),
        tp_degrees=tensor_parallel_from(args),
        recompute=_named(Recompute, args.recompute, "--recompute") or list(Recompute),
    )


def _named(allowed: type[Word], words: list[str] | None, flag: str) -> list[Word] | None:
    if words is None:
        return None
    known = [str(word) for word in allowed]
    if not words or any(word not in known for word in words):
        raise AutotuneError(f"{flag} {','.join(words)!r}: allowed are {', '.join(known)}.")
    return [allowed(word) for word in dict.fromkeys(words)]
