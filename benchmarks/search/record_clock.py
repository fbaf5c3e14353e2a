"""When a launch was ready and how long each of its rungs took, as its files say.

A rank touches its heartbeat first when its model is prepared and checked, right before its first
step, and rewrites its result as each rung ends. The times of those files are to the millisecond;
they are looked at about ten times a second.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from autotune.trial.protocol import (
    RankResult,
    heartbeat_file,
    rank_result_file,
    read_message,
)


@dataclass(kw_only=True, slots=True)
class LaunchClock:
    """To be made right before a launch starts; `look` is its `on_tick`."""

    folder: Path
    num_ranks: int
    started: float = field(default_factory=time.time)
    ready_s: float | None = None
    """From the start to the first step of the slowest rank; None when it was not reached."""
    wall_s: dict[int, float] = field(default_factory=dict)
    """Of each rung that ended, by its micro batch; the slowest rank's."""
    _ready: dict[int, float] = field(default_factory=dict)
    _changed: dict[int, float] = field(default_factory=dict)
    _ended: dict[int, dict[int, float]] = field(default_factory=dict)

    def look(self) -> None:
        """Take in what the ranks wrote since the last look."""
        for rank in range(self.num_ranks):
            if rank not in self._ready:
                beat = _modified(self.folder / heartbeat_file(rank))
                if beat is not None and beat >= self.started:
                    self._ready[rank] = beat - self.started
            self._look_at_result(rank)
        if self.ready_s is None and len(self._ready) == self.num_ranks:
            self.ready_s = max(self._ready.values())

    def _look_at_result(self, rank: int) -> None:
        path = self.folder / rank_result_file(rank)
        modified = _modified(path)
        if modified is None or modified < self.started or modified == self._changed.get(rank):
            return
        self._changed[rank] = modified
        ended = self._ended.setdefault(rank, {})
        for rung in read_message(RankResult, path).rungs:
            size = rung.micro_batch_size
            if size not in ended:
                before = max(ended.values(), default=self._ready.get(rank, 0.0))
                ended[size] = modified - self.started
                self.wall_s[size] = max(self.wall_s.get(size, 0.0), ended[size] - before)


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None
