"""What a report may be written over, and how a file comes to be there whole or not at all."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from autotune.errors import AutotuneError

_STUDY_FILES = ("study.json", "trials.jsonl", "summary.json", "best.yml", "study.journal")
"""What nothing can write again from the rest of a study."""
_HEAD_BYTES = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A file that is to be written."""

    flag: str
    """What names it on the command line."""
    path: Path
    mark: str | None
    """What a file of its kind carries: the generator of a page, or how the header of a table
    begins. None: a name in a study that is ours whatever it holds."""


def check_targets(targets: Sequence[Target]) -> None:
    """Refuse paths that cannot be written, or that hold anything but an older file of their kind.

    Raises:
        AutotuneError: nothing was written.
    """
    paths = [_resolve(target) for target in targets]
    if len(set(paths)) < len(paths):
        flags = " and ".join(target.flag for target in targets)
        raise AutotuneError(f"{flags} would both be {targets[0].path}. Give two names.")
    for target, path in zip(targets, paths, strict=True):
        _check(target, path)


def _resolve(target: Target) -> Path:
    try:
        return target.path.resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise AutotuneError(f"{target.flag} {target.path}: {error}. Give another path.") from None


def _check(target: Target, path: Path) -> None:
    name = f"{target.flag} {target.path}"
    if path.name in _STUDY_FILES and (path.parent / "study.json").exists():
        raise AutotuneError(
            f"{name} is a file of the study itself; it was left as it is. Give another name."
        )
    try:
        status = target.path.stat()
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise AutotuneError(
                f"{name} cannot be written: no folder {path.parent}. Make it, or give another path."
            ) from None
        return
    except OSError as error:
        raise AutotuneError(
            f"{name} cannot be written: {error.strerror}. Give another path."
        ) from error
    if stat.S_ISDIR(status.st_mode):
        raise AutotuneError(f"{name} is a folder. Give the name of a file.")
    if not stat.S_ISREG(status.st_mode) or _is_output_stream(status):
        # A device, a pipe, or /dev/stdout whatever it leads to: replacing it would take it away.
        raise AutotuneError(f"{name} is no regular file. Give the name of a file.")
    if target.mark is not None and status.st_size and not _carries(path, target.mark):
        raise AutotuneError(
            f"{name} exists and is none that autotune wrote; it was left as it is. Give another "
            "path, or remove it."
        )


def _is_output_stream(status: os.stat_result) -> bool:
    for descriptor in (1, 2):
        try:
            if os.path.samestat(status, os.fstat(descriptor)):
                return True
        except OSError:  # closed
            continue
    return False


def _carries(path: Path, mark: str) -> bool:
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES).decode(errors="replace")
    except OSError:
        return False
    is_page = head.startswith("<!doctype html>") and f'name="generator" content="{mark}"' in head
    return is_page or head.startswith(mark)


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it appears whole or not at all; a link stays one, its file is written.

    Raises:
        OSError: it cannot be written.
    """
    path = path.resolve()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # Line ends as they are: a table's are its writer's.
        temporary.write_text(text, encoding="utf-8", newline="")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
