"""Writing a verb's files: all of them or none, and never over another file unasked."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

from autotune.config.values import shorten
from autotune.errors import AutotuneError


def check_out(path: Path | None) -> None:
    """Refuse what is no file, before its name is used.

    A device or a pipe would be replaced by a file, or read without end to be compared.

    Raises:
        AutotuneError: `path` is a folder, a device or a pipe, or no path at all (a name too long).
    """
    if path is None:
        return
    try:
        mode = path.stat().st_mode if path.exists() else stat.S_IFREG
    except (OSError, ValueError) as error:
        raise AutotuneError(f"--out {shorten(str(path), 200)}: {_reason(error)}.") from None
    if stat.S_ISDIR(mode):
        raise AutotuneError(f"--out {path} is a folder. Give the path of a file in it.")
    if not stat.S_ISREG(mode):
        raise AutotuneError(
            f"--out {path} is no regular file. Give the path of one, or leave --out away: the text "
            "then goes to stdout."
        )


def write_files(files: Mapping[Path, str], *, force: bool) -> list[tuple[Path, str]]:
    """Write texts and return what was done to each path: written, replaced or unchanged.

    Raises:
        AutotuneError: a path that holds another text, without `force`; nothing is written then. A
            folder that is missing or cannot be written.
    """
    done = {path: _state(path, text) for path, text in files.items()}
    in_the_way = [str(path) for path, state in done.items() if state == "replaced"]
    if in_the_way and not force:
        raise AutotuneError(
            f"{', '.join(in_the_way)}: there is another file of that name; nothing was written. "
            "Give another --out, or --force to replace it."
        )
    for path, text in files.items():
        if done[path] != "unchanged":
            _write(path, text)
    return list(done.items())


def _state(path: Path, text: str) -> str:
    check_out(path)
    try:
        if not os.path.lexists(path):
            return "written"
        if not path.exists():  # a link to nothing: somebody's, all the same
            return "replaced"
        return "unchanged" if path.read_bytes() == text.encode() else "replaced"
    except (OSError, ValueError) as error:
        raise AutotuneError(f"--out {path}: {_reason(error)}.") from None


def _reason(error: OSError | ValueError) -> str:
    return str(getattr(error, "strerror", None) or error)


def _write(path: Path, text: str) -> None:
    """Write beside the path first: a full disk must not leave half a file. A link stays one."""
    try:
        if path.exists():
            path = path.resolve()
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise AutotuneError(f"--out {path}: {error.strerror}. Make the folder first.") from None
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    except OSError as error:
        os.unlink(name)
        raise AutotuneError(f"--out {path}: {error.strerror}.") from None
