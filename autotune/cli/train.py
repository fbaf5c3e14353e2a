"""`autotune train`: the full run a configuration describes."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from autotune.cli.data import add_data_arguments, dataset_from
from autotune.cli.nodes import add_node_arguments, follow_if_told, leading, ranks_per_node
from autotune.cli.options import held_out, positive_int, positive_number
from autotune.errors import AutotuneError, NothingFitsError
from autotune.units import format_bytes

if TYPE_CHECKING:
    from autotune.config import RunConfig
    from autotune.spec.training import DatasetSource
    from autotune.trial.protocol import Request


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the verb takes."""
    parser.add_argument(
        "config", type=Path, metavar="CONFIG.yml", help="best.yml, or an Axolotl configuration"
    )
    parser.add_argument(
        "--gpus",
        type=positive_int,
        metavar="N",
        help="ranks (default: the number the search measured on, or the file's own mesh)",
    )
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], help="default: the one the search measured on"
    )
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help="default: the file's own")
    add_data_arguments(parser)
    run_group = parser.add_argument_group("overrides of the file")
    run_group.add_argument(
        "--deepspeed",
        metavar="JSON",
        help="a DeepSpeed file, or a preset by name: zero1, zero2 ... (docs/configs.md)",
    )
    run_group.add_argument("--max-steps", type=positive_int, metavar="N")
    run_group.add_argument("--learning-rate", type=positive_number, metavar="LR")
    run_group.add_argument("--save-steps", type=positive_int, metavar="N")
    run_group.add_argument("--eval-steps", type=positive_int, metavar="N")
    run_group.add_argument(
        "--val-set-size", type=held_out, metavar="X", help="share (below 1) or number of sequences"
    )
    run_group.add_argument("--eval-batch-size", type=positive_int, metavar="N")
    parser.add_argument(
        "--no-ladder",
        action="store_true",
        help="stop at out-of-memory, instead of going on with a smaller micro batch, recomputation "
        "or offload at the same global batch; with --resume, go on at the file's own micro batch",
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="CHECKPOINT",
        help="go on from the last checkpoint, or from the one given",
    )
    add_node_arguments(parser)
    parser.add_argument(
        "--json", action="store_true", help="one JSON document on stdout at the end"
    )


def run(args: argparse.Namespace) -> int:
    """Train; the log is shown as it is written."""
    from autotune.config import load_config
    from autotune.ladder import at_recorded_rung, ladder_below, train_down
    from autotune.spec.hardware import detect_nodes

    config = load_config(args.config, {"deepspeed": args.deepspeed} if args.deepspeed else None)
    request = _request(args, config)
    num_gpus = request.plan_object().world_size
    if follow_if_told(args, num_gpus, request.device):
        return 0
    ladder, descent = None, None
    if not args.no_ladder:
        request, descent = at_recorded_rung(request)
        if descent is not None:
            sys.stderr.write(f"Going on at {descent.words()}. --no-ladder goes on at the file's.\n")
        ladder = ladder_below(
            request.plan_object(),
            config.model,
            request.workload,
            detect_nodes(num_gpus, args.nodes, request.device),
            config.autotune.ladder,
        )
    with leading(args, num_gpus, request.device) as starter:
        if starter is not None:
            starter.build_native_ops(request)
        ended = train_down(request, ladder, sys.stderr, starter, descent=descent)
    if ended.message:
        raise NothingFitsError(f"{ended.message} {ended.advice}")
    if args.json:
        sys.stdout.write(json.dumps(ended.document, indent=1) + "\n")
    else:
        host = format_bytes(ended.document["host_peak_bytes"])
        sys.stdout.write(
            f"Trained {ended.document['steps']} steps: {request.out_dir} "
            f"(host memory peak {host} a rank)\n"
        )
    return 0


def _request(args: argparse.Namespace, config: RunConfig) -> Request:
    from autotune.rules import check_plan
    from autotune.spec.hardware import detect_nodes
    from autotune.training import check_output_folder, last_checkpoint, make_request
    from autotune.trial.checkpoint import check_identity, check_whole, identity_of

    device: Literal["cuda", "cpu"] = (
        "cpu" if (args.device or config.autotune.device) == "cpu" else "cuda"
    )
    num_gpus = args.gpus or config.num_gpus or 1
    ranks_per_node(args, num_gpus)  # refuses what does not go together
    hardware = detect_nodes(num_gpus, args.nodes, device)
    out_dir = args.output_dir or Path(config.output_dir)
    datasets = _datasets(args, config)
    settings = config.train.model_copy(update=_overrides(args))
    if config.test_datasets and settings.val_set_size:
        raise AutotuneError(
            f"--val-set-size: {args.config} has test_datasets, which say what is held out. Leave "
            "one of them out."
        )
    named = settings.resume_from if args.resume is None else args.resume
    checkpoint = None
    if named is not None:
        checkpoint = Path(named) if named else last_checkpoint(out_dir)
        check_whole(checkpoint)
        settings = settings.model_copy(update={"resume_from": str(checkpoint.resolve())})
    check_output_folder(out_dir, checkpoint)
    plan = config.plan(num_gpus)
    workload = config.workload_on(num_gpus)
    broken = check_plan(plan, config.model, workload, hardware)
    if broken:
        raise AutotuneError(
            f"{args.config}: [{broken[0].code}] {broken[0].message} {broken[0].hint}"
        )
    request = make_request(
        config,
        plan=plan,
        workload=workload,
        device=device,
        out_dir=out_dir,
        datasets=datasets,
        settings=settings,
    )
    if checkpoint is not None:
        check_identity(checkpoint, identity_of(request, None))  # the ranks check the data
    return request


def _datasets(args: argparse.Namespace, config: RunConfig) -> list[DatasetSource]:
    given = dataset_from(args)
    datasets = [given] if given else list(config.datasets)
    if not datasets:
        raise AutotuneError(
            f"{args.config} names no datasets. Give the data with --data PATH, or add a "
            "`datasets:` list to the file."
        )
    return datasets


def _overrides(args: argparse.Namespace) -> dict[str, object]:
    names = (
        "max_steps", "learning_rate", "save_steps", "eval_steps", "eval_batch_size", "val_set_size",
    )  # fmt: skip
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}
