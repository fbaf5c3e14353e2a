"""A copy of a file that is about to be replaced, under a name that nothing else has."""

from __future__ import annotations

import shutil
from itertools import count
from pathlib import Path


def back_up(path: Path) -> Path:
    """Copy a file beside itself, as ``NAME.bak`` or the first free ``NAME.bak2`` and so on.

    Raises:
        OSError: the file cannot be read, or its folder not written.
    """
    content = path.read_bytes()
    for number in count(1):
        copy = path.with_name(f"{path.name}.bak{number if number > 1 else ''}")
        try:
            # "x" fails where the name is taken, so that two runs at once cannot share one either.
            with copy.open("xb") as file:
                file.write(content)
        except FileExistsError:
            continue
        shutil.copystat(path, copy)
        return copy
    raise AssertionError("count() does not end")
