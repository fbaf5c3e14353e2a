"""`autotune export`: the plan of a configuration in another tool's words."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from autotune.cli.options import positive_int
from autotune.errors import AutotuneError

if TYPE_CHECKING:
    from autotune.emit.job import Exported

_NAMES = ("axolotl", "accelerate", "deepspeed", "torchtitan", "llamafactory")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the verb takes."""
    parser.add_argument(
        "config", type=Path, metavar="CONFIG.yml", help="best.yml, or an Axolotl configuration"
    )
    parser.add_argument("--to", required=True, choices=_NAMES, metavar="TOOL",
                        help=", ".join(_NAMES))  # fmt: skip
    parser.add_argument(
        "--gpus",
        type=positive_int,
        metavar="N",
        help="ranks (default: the number the search measured on, or the file's own mesh)",
    )
    parser.add_argument(
        "--device",
        choices=["cuda", "cpu"],
        default="cuda",
        help="what the ranks run on (default: %(default)s)",
    )
    add_output_arguments(parser, "the main file; others it needs lie beside it")


def add_output_arguments(parser: argparse.ArgumentParser, what: str) -> None:
    """Add ``--out``, ``--force`` and ``--json``."""
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"{what} (default: stdout)")
    parser.add_argument(
        "--force", action="store_true", help="replace a file of that name with other content"
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON document on stdout instead of the text"
    )


def run(args: argparse.Namespace) -> int:
    """Write the export; warnings go to stderr."""
    from autotune.cli.files import check_out, write_files
    from autotune.config import load_config
    from autotune.emit.job import job_of
    from autotune.emit.targets import TARGETS, export

    check_out(args.out)
    config = load_config(args.config)
    num_gpus = args.gpus or config.num_gpus
    if num_gpus is None:
        raise AutotuneError(f"{args.config} does not say on how many GPUs it runs. Give --gpus N.")
    name = args.out.name if args.out else TARGETS[args.to].file_name
    done = export(job_of(config, num_gpus, args.device), args.to, name)
    for warning in done.warnings:
        sys.stderr.write(f"autotune: {warning}\n")
    states = []
    if args.out:
        files = {args.out.parent / name: text for name, text in done.files.items()}
        states = write_files(files, force=args.force)
    if args.json:
        document = {
            "target": args.to,
            "plan": config.plan(num_gpus).to_dict(),
            "world_size": num_gpus,
            "files": dict(done.files),
            "written": {str(path): state for path, state in states},
            "command": done.command,
            "lost": list(done.lost),
            "warnings": list(done.warnings),
        }
        sys.stdout.write(json.dumps(document, indent=1) + "\n")
    elif args.out:
        for path, state in states:
            sys.stderr.write(f"{path}: {state}\n")
        sys.stderr.write(f"Run in {args.out.parent}: {done.command}\n")
    else:
        sys.stdout.write(_alone(done, args.to))
    return 0


def _alone(done: Exported, target: str) -> str:
    if len(done.files) > 1:
        raise AutotuneError(
            f"--to {target}: this plan needs {len(done.files)} files ({', '.join(done.files)}). "
            "Give --out FILE; the others are written beside it."
        )
    return next(iter(done.files.values()))
