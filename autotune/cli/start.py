"""Where a search starts: `--from CONFIG` and `--deepspeed NAME`, and the space they make."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from autotune.cli.options import comma_list, workload_from
from autotune.errors import AutotuneError

if TYPE_CHECKING:
    from autotune.config.foreign import Loaded
    from autotune.search.start import Start
    from autotune.spec.hardware import HardwareSpec
    from autotune.spec.model import ModelSpec
    from autotune.spec.strategy import Strategy
    from autotune.spec.training import DatasetSource
    from autotune.spec.workload import Precision, Workload


def add_start_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--from`` and ``--deepspeed``."""
    group = parser.add_argument_group("where to start")
    group.add_argument(
        "--from",
        dest="start",
        type=Path,
        metavar="CONFIG",
        help="an Axolotl, accelerate or DeepSpeed configuration: its model, data, sequence, batch "
        "and GPUs hold where no flag says otherwise, and its plan is one of those measured",
    )
    group.add_argument(
        "--deepspeed",
        type=comma_list,
        metavar="NAME",
        help="a DeepSpeed file or a preset (zero2, zero3_bf16 ...): measure what it shards, alone "
        "or with --strategies; several with commas",
    )


@dataclass(frozen=True, kw_only=True)
class Given:
    """What is searched over, as flags and the file to start from say it together."""

    model_name: str
    model: ModelSpec
    num_gpus: int
    loaded: Loaded | None


def read_given(args: argparse.Namespace) -> Given:
    """Read the file to start from, if there is one; flags go over it.

    Raises:
        AutotuneError: no model or no number of GPUs, or what `load_any` refuses.
    """
    from autotune.spec.model import load_model

    if args.start is None:
        missing = [flag for flag in ("model", "gpus") if getattr(args, flag) is None]
        if missing:
            flags = " and ".join(f"--{flag}" for flag in missing)
            raise AutotuneError(
                f"{flags} needed: which model, on how many GPUs. Or give a configuration that "
                "says so with --from."
            )
        return Given(
            model_name=args.model, model=load_model(args.model), num_gpus=args.gpus, loaded=None
        )
    from autotune.config.foreign import StartingPoint, load_any

    start = StartingPoint(model=args.model, num_gpus=args.gpus, sequence_len=args.seq_len)
    loaded = load_any(args.start, start)
    if loaded.num_gpus is None:
        raise AutotuneError(f"{args.start} names no number of GPUs. Give it with --gpus.")
    config = loaded.config
    return Given(
        model_name=config.base_model,
        model=config.model,
        num_gpus=loaded.num_gpus,
        loaded=loaded,
    )


def workload_of(args: argparse.Namespace, given: Given) -> Workload:
    """Build the contract: what the flags state, else the file's, else the defaults."""
    if given.loaded is None:
        return workload_from(args, given.model)
    return workload_from(args, given.model, given.loaded.config.workload_on(given.num_gpus))


def datasets_of(given: Given) -> list[DatasetSource]:
    """Return the data the file names, local paths made absolute: `best.yml` lies elsewhere."""
    sources = given.loaded.config.datasets if given.loaded else ()
    return [
        source.model_copy(update={"path": str(Path(source.path).absolute())})
        if Path(source.path).exists()
        else source
        for source in sources
    ]


def start_of(
    args: argparse.Namespace, given: Given, workload: Workload, hardware: HardwareSpec
) -> Start | None:
    """Return the plan to start from, laid out on the hardware; None without ``--from``."""
    if given.loaded is None:
        return None
    from autotune.search.start import starting_plan
    from autotune.spec.strategy import load_strategies

    named = load_strategies(args.strategies) if args.strategies else []
    return starting_plan(
        given.loaded,
        args.start,
        hardware,
        workload.global_batch_size,
        [*named, *load_strategies()],
    )


def strategies_of(
    args: argparse.Namespace, model: ModelSpec, precision: Precision, start: Start | None
) -> list[Strategy]:
    """Return what is searched: those named, else all that ship; the start's own in any case."""
    from autotune.config.strategy import strategy_from_deepspeed
    from autotune.spec.strategy import load_strategies

    if args.deepspeed is None:
        chosen = load_strategies(args.strategies)
    else:
        chosen = load_strategies(args.strategies) if args.strategies else []
        for value in args.deepspeed or [""]:
            found = strategy_from_deepspeed(value, model, precision)
            if found.name not in _names(chosen):
                chosen.append(found)
    if start is not None and start.strategy.name not in _names(chosen):
        chosen.append(start.strategy)
    return chosen


def _names(strategies: Sequence[Strategy]) -> set[str]:
    return {strategy.name for strategy in strategies}


def start_words(start: Start) -> str:
    """Say where the search starts, and what of the file its trials leave out."""
    left_out = start.left_out()
    rest = f"; trials run without its {', '.join(left_out)}" if left_out else ""
    return (
        f"Starting from {start.path} ({start.loaded.kind}): {start.plan.describe()}, which is "
        f"measured too{rest}."
    )
