"""Flags that several verbs share, their defaults and their checks."""

from __future__ import annotations

import argparse
import math
import os
from typing import TYPE_CHECKING, get_args

from autotune.errors import AutotuneError
from autotune.spec.workload import (
    BaseStorage,
    LigerKernel,
    Lora,
    OptimizerName,
    Precision,
    Workload,
)
from autotune.units import parse_bytes

if TYPE_CHECKING:
    from autotune.spec.model import ModelSpec

_DEFAULTS = Workload()
GPU_TYPE_HELP = (
    "a catalogue name (h100-sxm, a100-80gb, l40s, rtx-4090 ...; a wrong one lists all), a YAML "
    "file of your own (docs/capacity.md), or cpu"
)


def whole_number(text: str) -> int:
    """Read a number from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number from 0 is needed")
    return int(text)


def positive_int(text: str) -> int:
    """Read a whole number above 0; argparse turns the error into its message."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return value


def seed_number(text: str) -> int:
    """Read a seed; NumPy takes 32 bits (`numpy.random.seed`)."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {2**32 - 1}")
    return value


def positive_number(text: str) -> float:
    """Read a finite number above 0."""
    value = _number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0, such as 2e-5")
    return value


def held_out(text: str) -> float:
    """Read a share below 1 or a whole number, 0 included."""
    value = _number(text)
    if value < 0 or (value > 1 and not value.is_integer()):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a share from 0 to 1 nor a whole number of sequences"
        )
    return value


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return -1.0
    return value if math.isfinite(value) else -1.0


def comma_list(text: str) -> list[str]:
    """Read ``a,b,c``."""
    return [word.strip() for word in text.split(",") if word.strip()]


def add_model_argument(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add ``--model``."""
    parser.add_argument(
        "--model",
        required=required,
        metavar="NAME",
        help="a catalogue name (qwen3-8b), a Hub id, a folder with a config.json, or a config.json",
    )


def add_workload_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags `workload_from` reads."""
    group = parser.add_argument_group("workload, held alike over all configurations")
    group.add_argument(
        "--seq-len",
        type=positive_int,
        metavar="TOKENS",
        help=f"tokens a sequence (default: {_DEFAULTS.seq_len})",
    )
    group.add_argument(
        "--global-batch-size",
        type=positive_int,
        metavar="N",
        help=f"sequences an optimizer step, over all GPUs (default: {_DEFAULTS.global_batch_size})",
    )
    group.add_argument(
        "--precision",
        choices=[str(p) for p in Precision],
        help="bf16 compute over fp32 master weights, or fp32 throughout (default: "
        f"{_DEFAULTS.precision})",
    )
    group.add_argument(
        "--optimizer",
        choices=get_args(OptimizerName),
        help=f"default: {_DEFAULTS.optimizer}; those in 8 bits are bitsandbytes'",
    )
    group.add_argument(
        "--packing",
        action=argparse.BooleanOptionalAction,
        help="several documents in one sequence, attention inside each (default: on)",
    )
    group.add_argument(
        "--adapter",
        choices=["lora", "qlora"],
        help="train a LoRA adapter instead of all parameters; qlora: over a base in 4 bits",
    )
    group.add_argument(
        "--lora-r",
        type=positive_int,
        metavar="R",
        help=f"rank of the adapter (default: {Lora().r})",
    )
    group.add_argument(
        "--liger",
        action="store_true",
        help="Liger's kernels for rotary embedding, norms, FFN and loss (CUDA)",
    )
    group.add_argument(
        "--chunked-loss",
        action="store_true",
        help="cross-entropy over slices of the tokens: the same loss in less memory",
    )
    group.add_argument(
        "--fp8",
        action="store_true",
        help="the layers' projections in 8-bit floats, by torchao; CPU ranks emulate it, slower",
    )


def workload_from(
    args: argparse.Namespace, model: ModelSpec, start: Workload = _DEFAULTS
) -> Workload:
    """Build the workload the flags state; an adapter targets every projection of the model.

    Args:
        args: What was given.
        model: Names the projections.
        start: What holds where no flag says otherwise.
    """
    given = {
        "seq_len": args.seq_len,
        "global_batch_size": args.global_batch_size,
        "precision": args.precision and Precision(args.precision),
        "optimizer": args.optimizer,
        "packing": args.packing,
        "liger": tuple(LigerKernel) if args.liger else None,
        "chunked_loss": args.chunked_loss or None,
        "fp8": args.fp8 or None,
    }
    stated = {name: value for name, value in given.items() if value is not None}
    return Workload.model_validate(
        {name: getattr(start, name) for name in Workload.model_fields}
        | stated
        | {"adapter": _adapter_from(args, model, start.adapter)}
    )


def _adapter_from(args: argparse.Namespace, model: ModelSpec, start: Lora | None) -> Lora | None:
    if args.adapter:
        return Lora(
            r=args.lora_r or Lora().r,
            target_modules=tuple(model.linears),
            base_storage=BaseStorage.NF4_DOUBLE if args.adapter == "qlora" else None,
        )
    if start is not None and args.lora_r:
        return start.model_copy(update={"r": args.lora_r})
    return start


def integers(words: list[str] | None, flag: str) -> list[int] | None:
    """Return the values of a comma list of whole numbers, ascending; None where it is not given.

    Raises:
        AutotuneError: one of them is none, or below 1.
    """
    if words is None:
        return None
    try:
        values = sorted({int(word) for word in words})
    except ValueError:
        values = []
    if not values or values[0] < 1:
        raise AutotuneError(f"{flag} {','.join(words)!r}: whole numbers above 0 are needed.")
    return values


def add_tensor_parallel_argument(group: argparse._ActionsContainer) -> None:
    """Add ``--tensor-parallel``."""
    group.add_argument(
        "--tensor-parallel",
        type=comma_list,
        metavar="1,2",
        help="degrees, with FSDP2's strategies (default: 1)",
    )


def tensor_parallel_from(args: argparse.Namespace) -> list[int]:
    """Read ``--tensor-parallel``."""
    return integers(args.tensor_parallel, "--tensor-parallel") or [1]


def add_hardware_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--gpus``, ``--gpu-type`` and ``--memory-limit``."""
    group = parser.add_argument_group("hardware")
    group.add_argument(
        "--gpus", type=positive_int, required=True, metavar="N", help="number of GPUs (ranks)"
    )
    group.add_argument(
        "--gpu-type",
        metavar="TYPE",
        help=f"{GPU_TYPE_HELP} (default: the GPUs of this machine); more than 8 are nodes of 8",
    )
    group.add_argument(
        "--memory-limit",
        metavar="SIZE",
        help="memory a GPU may use, such as 600MiB or 40GiB (default: all of it)",
    )


def memory_limit_from(args: argparse.Namespace) -> int | None:
    """Read ``--memory-limit`` as bytes."""
    return parse_bytes(args.memory_limit) if args.memory_limit else None


def add_knowledge_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--no-knowledge``."""
    parser.add_argument(
        "--no-knowledge",
        action="store_true",
        help="leave what earlier searches on this machine measured alone (docs/knowledge.md)",
    )


def use_knowledge(args: argparse.Namespace) -> None:
    """Let ``--no-knowledge`` switch the knowledge base off, as its variable does."""
    from autotune.memory.knowledge import VARIABLE

    if args.no_knowledge:
        os.environ[VARIABLE] = "off"
