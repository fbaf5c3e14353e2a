"""`autotune migrate`: a configuration from FSDP1 to FSDP2."""

from __future__ import annotations

import argparse
import json
import os
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from autotune.cli.options import positive_int
from autotune.errors import AutotuneError

if TYPE_CHECKING:
    from autotune.migrate import Mesh, Migration


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the verb takes."""
    parser.add_argument(
        "config", type=Path, metavar="CONFIG.yml", help="an Axolotl or an accelerate configuration"
    )
    parser.add_argument(
        "--in-place",
        action="store_true",
        help="change the file itself, after a copy of it (CONFIG.yml.bak)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write the migrated configuration there"
    )
    parser.add_argument(
        "--gpus",
        type=positive_int,
        metavar="N",
        help="GPUs on all nodes together, for a hybrid strategy; with --nodes",
    )
    parser.add_argument(
        "--nodes", type=positive_int, metavar="M", help="nodes, for a hybrid strategy; with --gpus"
    )
    parser.add_argument(
        "--as-written",
        action="store_true",
        help="take settings at their word that FSDP1 ignored (default: go on as it trained)",
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON document on stdout instead of the diff"
    )


def run(args: argparse.Namespace) -> int:
    """Print the diff, and write where a flag says so; 0 also when there was nothing to do."""
    from autotune.migrate import migrate

    if args.in_place and args.out is not None:
        raise AutotuneError("--in-place and --out exclude each other. Give one of them.")
    if args.out is not None:
        _check_new(args.out, args.config)
    migration = migrate(args.config, mesh=_mesh(args), as_written=args.as_written)
    written, backup = _write(args, migration)
    for warning in migration.warnings:
        sys.stderr.write(f"autotune: {warning}\n")
    if args.json:
        sys.stdout.write(json.dumps(_document(migration, written, backup), indent=1) + "\n")
        return 0
    sys.stdout.write(migration.diff)
    if written is not None:
        copy = f"; what it was is in {backup}" if backup else ""
        sys.stderr.write(f"Wrote {written}{copy}\n")
    elif migration.changed:
        sys.stderr.write("Nothing was written: give --in-place or --out FILE.\n")
    else:
        sys.stderr.write(f"{args.config} needs no change.\n")
    return 0


def _mesh(args: argparse.Namespace) -> Mesh | None:
    from autotune.migrate import Mesh

    if args.gpus is None and args.nodes is None:
        return None
    if args.gpus is None or args.nodes is None:
        raise AutotuneError("--gpus and --nodes belong together. Give both or none.")
    return Mesh(num_gpus=args.gpus, num_nodes=args.nodes)


def _check_new(out: Path, config: Path) -> None:
    if os.path.lexists(out):
        hint = "--in-place changes the file itself." if out == config else "Give another path."
        raise AutotuneError(f"--out {out} exists; it was left as it is. {hint}")
    if not out.parent.is_dir():
        raise AutotuneError(f"--out {out}: no folder {out.parent}. Make it, or give another path.")


def _write(args: argparse.Namespace, migration: Migration) -> tuple[Path | None, Path | None]:
    """Write what the flags ask for; return the file and the copy of what it was."""
    from autotune.cli.backup import back_up
    from autotune.report.files import write_whole

    target: Path = args.out or args.config
    backup = None
    try:
        if args.out is not None:
            write_whole(target, migration.after)
        elif args.in_place and migration.changed:
            mode = stat.S_IMODE(target.stat().st_mode)
            backup = back_up(target)
            write_whole(target, migration.after)
            target.chmod(mode)
        else:
            return None, None
    except OSError as error:
        raise AutotuneError(
            f"{target} cannot be written: {error.strerror or error}. It is as it was."
        ) from error
    return target, backup


def _document(migration: Migration, written: Path | None, backup: Path | None) -> dict[str, object]:
    return {
        "config": str(migration.path),
        "kind": migration.kind,
        "changed": migration.changed,
        "diff": migration.diff,
        "warnings": list(migration.warnings),
        "written": str(written) if written else None,
        "backup": str(backup) if backup else None,
        "result": migration.after,
    }
