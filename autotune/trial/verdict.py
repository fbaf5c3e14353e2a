"""How a launch ended: from exit codes, results and the watch's verdict to one outcome."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass, field

from autotune.trial.memory_left import TWO_STACKS_BYTES
from autotune.trial.protocol import Outcome, Phase, RankResult
from autotune.trial.ranks import RankProcess
from autotune.trial.watch import Rank, Verdict
from autotune.units import format_bytes

_NATIVE_DEATHS = ("SIGSEGV", "SIGABRT")
"""What native code ends by that gets no memory: a null pointer followed, or std::terminate."""
_NEAR = 0.125
"""Share of a rank's limit that it may have left and still have died of it: it is looked at ten
times a second, and dies of what it asked for after the last look."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """How a launch ended, before its results are read."""

    outcome: Outcome
    message: str
    rank: int | None
    """The rank that caused it."""
    phase: Phase | None = None
    """What that rank was at."""
    exit_codes: list[int | None]
    elapsed_s: float
    notes: list[str] = field(default_factory=list)
    results: list[RankResult] = field(default_factory=list)
    """What every rank wrote, complete or not; by rank."""


def conclude(
    ranks: Sequence[Rank],
    results: list[RankResult],
    verdict: Verdict | None,
    elapsed: float,
    *,
    host_out_of_memory: bool,
    memory_limit_bytes: int | None = None,
) -> Ended:
    """Name the outcome, and the rank that caused it.

    Args:
        ranks: all of them, after they were stopped.
        results: what each wrote, by rank.
        verdict: why the watch stopped them, if it did.
        elapsed: seconds from the launch's start.
        host_out_of_memory: the kernel killed a process for memory meanwhile.
        memory_limit_bytes: of a rank, above what its imports took; None without one.
    """
    exit_codes = [rank.process.returncode for rank in ranks]
    outcome, message, culprit, notes = Outcome.OK, "", None, []
    if verdict is not None:
        outcome, message, culprit = verdict.outcome, verdict.message, verdict.rank
    else:
        failures = []
        for rank, result in zip(ranks, results, strict=True):
            if result.error is not None:
                error = result.error
                failures.append((error.time_s, rank.number, error.outcome, error.message))
            elif not result.complete and rank.ended_at is not None:
                how, kind = _describe_exit(
                    rank.process,
                    host_out_of_memory=host_out_of_memory,
                    near_bytes=max(TWO_STACKS_BYTES, int(_NEAR * (memory_limit_bytes or 0))),
                )
                # Its death is noticed late, and by then the others have met its silence.
                failures.append((rank.alive_at, rank.number, kind, f"rank {rank.number} {how}"))
            elif result.complete and rank.process.returncode != 0:
                notes.append(
                    f"rank {rank.number} finished, then ended with {rank.process.returncode}"
                )
        if failures:
            _, culprit, outcome, message = min(failures)
        elif not all(result.complete for result in results):
            outcome, message = Outcome.CRASHED, "a rank left no complete result"
    return Ended(
        outcome=outcome,
        message=message,
        rank=culprit,
        phase=None if culprit is None else results[culprit].phase,
        exit_codes=exit_codes,
        elapsed_s=elapsed,
        notes=notes,
        results=results,
    )


def _describe_exit(
    process: RankProcess, *, host_out_of_memory: bool, near_bytes: int
) -> tuple[str, Outcome]:
    """Say how a rank ended; with less than `near_bytes` left below its limit, memory was why."""
    code = process.returncode
    if code is None or code >= 0:
        return f"ended with code {code} and no complete result", Outcome.CRASHED
    known = {each.value for each in signal.Signals}
    name = signal.Signals(-code).name if -code in known else f"signal {-code}"
    if name == "SIGKILL" and host_out_of_memory:
        return "was killed by the kernel: the host ran out of memory", Outcome.HOST_OOM
    left = process.memory_left() if name in _NATIVE_DEATHS else None
    if left is None:
        return f"was killed by {name}", Outcome.CRASHED
    seen = f"was killed by {name} with {format_bytes(max(0, left))} left below its memory limit"
    if left < near_bytes:
        return f"{seen}, as native code is that gets none", Outcome.OOM
    return f"{seen}: a crash, not for want of memory", Outcome.CRASHED
