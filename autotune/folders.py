"""Folders that commands write into."""

from __future__ import annotations

from pathlib import Path

from autotune.errors import AutotuneError


def make_folder(folder: Path, flag: str) -> None:
    """Make a folder and those above it, where they are not there yet.

    Args:
        folder: The folder.
        flag: What gives another, for the message.

    Raises:
        AutotuneError: it cannot be made, such as below a file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AutotuneError(
            f"{flag} {folder}: no folder can be made there: {error.strerror or error}. Give "
            "another."
        ) from error
