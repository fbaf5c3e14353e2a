"""What lies in a launch's folder, and which launch a folder is of."""

from __future__ import annotations

import re
from pathlib import Path

from autotune.trial.protocol import (
    REQUEST_FILE,
    RankResult,
    Request,
    heartbeat_file,
    rank_result_file,
    read_message,
    rung_file,
)


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
    try:
        result = read_message(RankResult, folder / rank_result_file(number))
    except FileNotFoundError:
        return None
    return result if result.launch_id == launch_id else None


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
