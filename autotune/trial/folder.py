"""What lies in a launch's folder, and which launch a folder is of."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from autotune.trial.protocol import (
    REQUEST_FILE,
    RankResult,
    Request,
    Rung,
    RungOrder,
    heartbeat_file,
    rank_result_file,
    read_message,
    rung_file,
)

LAUNCHES = "launches"
"""Of a study or a run: the folder with its launches' folders."""


def read_results(folder: Path) -> list[RankResult]:
    """Return what each rank of the folder's request wrote; empty for a rank that wrote nothing."""
    request = read_message(Request, folder / REQUEST_FILE)
    world, launch_id = request.plan_object().world_size, request.launch_id
    return [
        read_result(folder, number, launch_id)
        or RankResult(launch_id=launch_id, rank=number, world_size=world)
        for number in range(world)
    ]


def read_result(folder: Path, number: int, launch_id: str) -> RankResult | None:
    """Return a rank's result; None while there is none of this launch."""
    path = folder / rank_result_file(number)
    try:
        found = path.stat()
        result = _parsed(path, (found.st_ino, found.st_mtime_ns, found.st_size))
    except FileNotFoundError:
        return None
    return result if result.launch_id == launch_id else None


@lru_cache(maxsize=64)
def _parsed(path: Path, stamp: tuple[int, int, int]) -> RankResult:
    """Read a result once for all looks at it: a watch looks often, on the cores it measures.

    Ranks replace the file, so another content is another file.
    """
    return read_message(RankResult, path)


def asked_rungs(folder: Path) -> list[Rung]:
    """Return the rungs a conversation's ranks were asked for, in order; see `RungOrder`.

    With them in its `rungs`, the folder's request and `read_results` give the records of a launch
    whose supervisor died: `autotune.trial.outcome.read_rungs`.
    """
    launch_id = read_message(Request, folder / REQUEST_FILE).launch_id
    orders = [read_message(RungOrder, path) for path in sorted(folder.glob(rung_file("*")))]
    return [order.rung for order in orders if order.rung and order.launch_id == launch_id]


def clear_results(folder: Path) -> None:
    """Remove what the ranks of an earlier launch wrote here, and what they were told."""
    for pattern in (rank_result_file("*"), heartbeat_file("*"), rung_file("*")):
        for left in folder.glob(pattern):
            left.unlink()


def numbered_launches(parent: Path) -> list[tuple[int, Path]]:
    """Return the launch folders in `parent` by the number their names begin with."""
    if not parent.is_dir():
        return []
    named = [(re.match(r"\d+", path.name), path) for path in parent.iterdir()]
    return sorted((int(number[0]), path) for number, path in named if number)
