"""`autotune fetch deepspeed_configs`: the shipped presets as files of one's own."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from autotune.errors import AutotuneError, nearest
from autotune.folders import make_folder

_WHAT = ("deepspeed_configs",)


class Action(StrEnum):
    """What happened to one file."""

    WRITTEN = "written"
    UNCHANGED = "unchanged"
    REPLACED = "replaced"
    """It differed; the old one is kept under another name."""
    KEPT = "kept"
    """It differs from the shipped one and was left alone."""
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True, slots=True)
class Fetched:
    """One preset, and what became of it."""

    name: str
    action: Action
    note: str = ""
    """Of a replaced file the path of its copy, of a failed one the reason."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the verb takes."""
    parser.add_argument("what", metavar="WHAT", help=f"what to fetch: {', '.join(_WHAT)}")
    parser.add_argument(
        "--dest",
        type=Path,
        metavar="DIR",
        help="folder the files go to (default: deepspeed_configs here)",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace files that differ, each after a copy of it (NAME.bak)",
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON document on stdout instead of lines"
    )


def run(args: argparse.Namespace) -> int:
    """Copy the presets; 1 when a file was kept back or could not be written."""
    if args.what not in _WHAT:
        raise AutotuneError(
            f"fetch {args.what}: there is nothing of that name."
            f"{nearest(args.what, _WHAT)} Known: {', '.join(_WHAT)}."
        )
    dest = args.dest or Path(args.what)
    files = fetch_presets(dest, force=args.force)
    counts = {str(action): sum(f.action is action for f in files) for action in Action}
    if args.json:
        document = {
            "dest": str(dest),
            "files": [{"name": f.name, "action": str(f.action), "note": f.note} for f in files],
            "counts": counts,
        }
        sys.stdout.write(json.dumps(document, indent=1) + "\n")
    else:
        _print(dest, files, counts)
    return 1 if counts[Action.KEPT] or counts[Action.FAILED] else 0


def fetch_presets(dest: Path, *, force: bool) -> list[Fetched]:
    """Copy every preset of the installed package into a folder, which is made if need be.

    Args:
        dest: The folder.
        force: Replace files that differ, each after a copy of it.

    Raises:
        AutotuneError: no such folder can be made.
    """
    from autotune.config import preset_names

    make_folder(dest, "--dest")
    return [_fetch(name, dest / name, force=force) for name in preset_names()]


def _fetch(name: str, path: Path, *, force: bool) -> Fetched:
    from autotune.cli.backup import back_up
    from autotune.config.presets import preset_text
    from autotune.report.files import write_whole

    shipped = preset_text(name)
    note, action = "", Action.WRITTEN
    try:
        if path.exists():
            if path.read_bytes() == shipped.encode():
                return Fetched(name=name, action=Action.UNCHANGED)
            if not force:
                return Fetched(name=name, action=Action.KEPT)
            note, action = str(back_up(path)), Action.REPLACED
        write_whole(path, shipped)
    except OSError as error:
        return Fetched(name=name, action=Action.FAILED, note=error.strerror or str(error))
    return Fetched(name=name, action=action, note=note)


def _print(dest: Path, files: list[Fetched], counts: dict[str, int]) -> None:
    words = {
        Action.KEPT: "kept: it differs from the shipped file (--force replaces it, after a copy)",
        Action.REPLACED: "replaced; the old one is {note}",
        Action.FAILED: "failed: {note}",
    }
    for file in files:
        said = words.get(file.action, str(file.action)).format(note=file.note)
        sys.stdout.write(f"{file.name:<38} {said}\n")
    summary = ", ".join(f"{count} {action}" for action, count in counts.items() if count)
    sys.stdout.write(f"{dest}: {summary}.\n")
