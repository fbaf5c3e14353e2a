"""Watch the ranks of one launch, and stop them."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from autotune.trial.folder import read_result
from autotune.trial.protocol import Outcome, heartbeat_file
from autotune.trial.ranks import RankProcess

_POLL_S = 0.1
_STOPPED_S = 3.0
"""A rank that a signal stopped for this long hangs the others."""
_LAST_WORDS_S = 3.0
"""After one rank failed, how long the others may take to say what they saw."""
_EXIT_S = 20.0
"""After a rank's complete result, how long its process may take to end."""
_TERMINATE_S = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """When a launch is given up."""

    deadline_s: float | None
    """From its start; None for a full training run."""
    hang_s: float
    """Without a sign of progress from any rank."""


@dataclass(kw_only=True, slots=True)
class Rank:
    """A rank as the watch knows it."""

    number: int
    process: RankProcess
    alive_at: float
    """When it was last seen running: it ended after this, and at the latest at `ended_at`."""
    stopped_since: float | None = None
    ended_at: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Why the watch ended ranks that had not ended by themselves."""

    outcome: Outcome
    message: str
    rank: int | None


class Seen(Enum):
    """Why the watch was over, where it was no `Verdict`."""

    ENDED = "ended"
    """Every rank ended, or one did and the others had their last words, or all results count."""
    HOLDS = "holds"
    """What the watch was to wait for."""


def watch(
    ranks: Sequence[Rank],
    folder: Path,
    launch_id: str,
    *,
    hang_s: float,
    deadline: tuple[float, str] | None,
    on_tick: Callable[[], None],
    until: Callable[[], bool] = lambda: False,
    poll_s: float = _POLL_S,
) -> Verdict | Seen:
    """Watch until the ranks have ended, must be ended, or a condition holds.

    Args:
        ranks: the launch's ranks; brought up to date.
        folder: the launch's folder.
        launch_id: which results count.
        hang_s: how long no rank may make progress.
        deadline: on `time.monotonic()`, and how messages call it.
        on_tick: called after each look.
        until: the condition.
        poll_s: from one look to the next.
    """
    first_failure: float | None = None
    all_well: float | None = None
    while True:
        now = time.monotonic()
        if until():
            return Seen.HOLDS
        for rank in ranks:
            if rank.ended_at is not None:
                continue
            if rank.process.poll() is None:
                rank.alive_at = now
                continue
            rank.ended_at = now
            if not _finished_well(folder, rank.number, launch_id):
                first_failure = first_failure or now
        if all(rank.ended_at is not None for rank in ranks):
            return Seen.ENDED
        if first_failure is not None and now - first_failure > _LAST_WORDS_S:
            return Seen.ENDED
        if first_failure is None and all(
            rank.ended_at or _finished_well(folder, rank.number, launch_id) for rank in ranks
        ):
            all_well = all_well or now
            if now - all_well > _EXIT_S:
                return Seen.ENDED  # a process will not end, but every result is complete and counts
        if first_failure is None:
            verdict = _stalled(ranks, folder, hang_s, deadline, now)
            if verdict is not None:
                return verdict
        on_tick()
        time.sleep(poll_s)


def stop(ranks: Sequence[Rank]) -> None:
    """Ask, then force. A stopped process ignores SIGTERM, so it gets no second chance."""
    running = [rank for rank in ranks if rank.process.poll() is None]
    for rank in running:
        rank.process.signal(signal.SIGTERM)
    deadline = time.monotonic() + _TERMINATE_S
    while time.monotonic() < deadline and any(r.process.poll() is None for r in running):
        time.sleep(0.05)
    for rank in running:
        rank.process.signal(signal.SIGKILL)  # the whole group, so a rank's children go too
    for rank in running:
        rank.process.wait(30)  # in the kernel, freeing its memory


def _stalled(
    ranks: Sequence[Rank],
    folder: Path,
    hang_s: float,
    deadline: tuple[float, str] | None,
    now: float,
) -> Verdict | None:
    for rank in ranks:
        if rank.process.state() in ("T", "t"):
            rank.stopped_since = rank.stopped_since or now
            if now - rank.stopped_since > _STOPPED_S:
                return Verdict(
                    outcome=Outcome.HANG,
                    message=f"rank {rank.number} was stopped by a signal and did not continue",
                    rank=rank.number,
                )
        else:
            rank.stopped_since = None
    silence, slowest = _silence(ranks, folder)
    if silence > hang_s:
        return Verdict(
            outcome=Outcome.HANG,
            message=f"no rank made progress for {hang_s:.0f} s; rank {slowest} was last",
            rank=slowest,
        )
    if deadline is not None and now > deadline[0]:
        return Verdict(
            outcome=Outcome.TIMEOUT, message=f"still running at {deadline[1]}", rank=None
        )
    return None


def _silence(ranks: Sequence[Rank], folder: Path) -> tuple[float, int]:
    """Return the seconds since any rank's last sign of life, and the rank silent the longest."""
    ages = {}
    for rank in ranks:
        try:
            modified = (folder / heartbeat_file(rank.number)).stat().st_mtime
        except FileNotFoundError:  # still importing
            return 0.0, rank.number
        ages[rank.number] = time.time() - modified
    return min(ages.values()), max(ages, key=lambda number: ages[number])


def _finished_well(folder: Path, number: int, launch_id: str) -> bool:
    result = read_result(folder, number, launch_id)
    return result is not None and result.complete and result.error is None
