"""`autotune merge`: a trained adapter and its base as one model."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autotune.errors import AutotuneError
from autotune.folders import make_folder

if TYPE_CHECKING:
    from autotune.trial.adapters import MergeOrder

_LIMIT_S = 6 * 3600
"""The largest models are some hundred GB to read and to write."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the verb takes."""
    parser.add_argument(
        "run",
        type=Path,
        metavar="DIR",
        help="output of `autotune train` with an adapter, or one of its checkpoints",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="where the merged model goes"
    )
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="weights the adapter goes on, a folder or Hub id (default: those it was trained on)",
    )
    parser.add_argument("--force", action="store_true", help="replace what --out holds, all of it")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")


def run(args: argparse.Namespace) -> int:
    """Merge in a process of its own; the output appears whole or not at all."""
    from autotune.trial.adapters import merge_order

    out = args.out.resolve()
    _check_out(out, args.run.resolve(), force=args.force)
    make_folder(out.parent, "--out")
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        made = Path(folder) / "merged"
        made.mkdir()
        order = merge_order(args.run.resolve(), args.base, made)
        _check_base_stays(out, Path(order.base).resolve())
        answer = _merge(order)
        _put(made, out, Path(folder) / "replaced")
    document = {"out": str(args.out), "adapter": order.adapter, "base": order.base, **answer}
    if args.json:
        sys.stdout.write(json.dumps(document, indent=1) + "\n")
    else:
        sys.stdout.write(
            f"Merged {answer['layers']} layers of {order.adapter} into {order.base}: {args.out} "
            f"({answer['dtype']})\n"
        )
    return 0


def _put(made: Path, out: Path, aside: Path) -> None:
    """Rename `made` to `out`; what `out` held goes aside, and back where that fails."""
    if out.exists():
        out.rename(aside)
    try:
        made.rename(out)
    except OSError:
        if aside.exists():
            aside.rename(out)
        raise


def _check_out(out: Path, run: Path, *, force: bool) -> None:
    if out == run or out in run.parents:
        raise AutotuneError(f"--out {out} holds the adapter itself. Give another folder.")
    if out.is_file():
        raise AutotuneError(f"--out {out} is a file. Give a folder.")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise AutotuneError(
            f"--out {out} is not empty; nothing was overwritten. Give another folder, or --force "
            "to replace all of it."
        )


def _check_base_stays(out: Path, base: Path) -> None:
    """--force replaces a folder whole; the base may have no other copy."""
    if out == base or out in base.parents:
        raise AutotuneError(f"--out {out} holds the base itself. Give another folder.")


def _merge(order: MergeOrder) -> dict[str, Any]:
    command = [sys.executable, "-m", "autotune.runner.merge", order.model_dump_json()]
    parent = str(Path(__file__).resolve().parents[2])
    paths = os.pathsep.join(filter(None, [parent, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=_LIMIT_S,
        check=False,
    )
    last = (done.stdout.strip().splitlines() or [""])[-1]
    try:
        answer: dict[str, Any] = json.loads(last)
    except ValueError:
        shown = "\n".join(done.stderr.strip().splitlines()[-15:])
        raise RuntimeError(f"the merge ended with {done.returncode}:\n{shown}") from None
    if "error" in answer:
        raise AutotuneError(answer["error"])
    return answer
