"""Which finalist won: the mean of its confirming launches, its interval, what ties with it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from autotune.plan import Plan
from autotune.trial.outcome import t_quantile_95
from autotune.trial.protocol import Outcome
from autotune.trial.record import TrialRecord

_EQUAL = 0.02
"""A tie may win by its memory only where it is slower than the fastest by no more than this."""
_ASSUMED_SPREAD = 0.02
"""Relative standard deviation between launches of one plan, before any were compared."""
_ASSUMED_FREEDOM = 3
"""Weight of that: as if so many comparisons had shown it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Confirmed:
    """A finalist over its confirming launches."""

    plan: dict[str, Any]
    plan_id: str
    launches: int
    tokens_per_s: float
    """Mean over the launches."""
    low: float
    high: float
    """95% interval of that mean, from the spread between launches of all finalists."""
    step_s: float
    peak_bytes: int | None
    """Largest over the launches, reserved."""
    tokens_per_s_by_launch: tuple[float, ...]
    last: TrialRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What the confirmations say."""

    winner: Confirmed
    ties: tuple[Confirmed, ...]
    """Finalists whose interval of the difference to the fastest holds zero; without the winner."""
    others: tuple[Confirmed, ...]
    failed: tuple[TrialRecord, ...]
    """Of finalists that did not run well every time: these never win."""
    drift: float | None
    """Last launch of the winner's plan over its first of the study, less 1, in tokens/s."""

    def sentences(self) -> list[str]:
        """Say it to people."""
        won = self.winner
        said = [
            f"Confirmed in {won.launches} fresh launches: {won.tokens_per_s:,.0f} tokens/s, "
            f"95% interval {won.low:,.0f} to {won.high:,.0f}."
        ]
        if self.ties:
            names = ", ".join(_name(tie) for tie in self.ties)
            said.append(
                f"A tie with {names}: the launches do not tell them apart. Of those within "
                f"{_EQUAL:.0%} of the fastest, the winner leaves the most memory free."
            )
        said += [
            f"{Plan.from_dict(record.plan).describe()} did not hold: {record.outcome}"
            + (f", {record.message}." if record.message else ".")
            for record in self.failed
        ]
        if self.drift is not None:
            said.append(
                f"From the first to the last launch of the winner its speed changed by "
                f"{self.drift:+.1%}."
            )
        return said

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form that `summary.json` holds."""
        return {
            "winner": self.winner.plan_id,
            "tokens_per_s": self.winner.tokens_per_s,
            "interval": [self.winner.low, self.winner.high],
            "launches": self.winner.launches,
            "ties": [tie.plan_id for tie in self.ties],
            "failed": [record.plan_id for record in self.failed],
            "drift": self.drift,
            "said": self.sentences(),
        }


def judge(confirmations: Sequence[TrialRecord], explored: Iterable[TrialRecord]) -> Verdict | None:
    """Return the verdict; None where no finalist ran well every time.

    Args:
        confirmations: Records of the confirming launches, in order.
        explored: Records of the search itself, of which the winner's is its first launch.
    """
    by_plan: dict[str, list[TrialRecord]] = {}
    for record in confirmations:
        if record.outcome is not Outcome.INTERRUPTED:
            by_plan.setdefault(record.plan_id, []).append(record)
    good = {plan: own for plan, own in by_plan.items() if all(_held(record) for record in own)}
    if not good:
        return None
    spread, freedom = _pooled_spread(good.values())
    finalists = [_confirmed(own, spread, freedom) for own in good.values()]
    fastest = max(finalists, key=lambda finalist: finalist.tokens_per_s)
    tied = [f for f in finalists if f is fastest or _is_tie(f, fastest, spread, freedom)]
    # Ties go to the larger headroom, the least memory taken; what only too few launches cannot tell
    # from the fastest is named, but does not win.
    near = [f for f in tied if f.tokens_per_s >= (1 - _EQUAL) * fastest.tokens_per_s]
    winner = min(near, key=lambda f: (f.peak_bytes or 0, -f.tokens_per_s))
    first = next((r for r in explored if r.plan_id == winner.plan_id and r.tokens_per_s), None)
    before = first.tokens_per_s if first else None
    now = winner.last.tokens_per_s
    return Verdict(
        winner=winner,
        ties=tuple(f for f in tied if f is not winner),
        others=tuple(f for f in finalists if f not in tied),
        failed=tuple(failures(confirmations).values()),
        drift=now / before - 1 if before and now else None,
    )


def failures(confirmations: Iterable[TrialRecord]) -> dict[str, TrialRecord]:
    """Return the first failure of each finalist that did not run well every time, by plan id."""
    found: dict[str, TrialRecord] = {}
    for record in confirmations:
        if record.outcome is not Outcome.INTERRUPTED and not _held(record):
            found.setdefault(record.plan_id, record)
    return found


def _held(record: TrialRecord) -> bool:
    return record.outcome is Outcome.OK and record.tokens_per_s is not None


def _confirmed(own: list[TrialRecord], spread: float, freedom: int) -> Confirmed:
    rates = [record.tokens_per_s or 0.0 for record in own]
    mean = statistics.mean(rates)
    half = t_quantile_95(freedom) * spread * mean / math.sqrt(len(own))
    peaks = [r.peak_reserved_bytes or r.peak_allocated_bytes or 0 for r in own]
    return Confirmed(
        plan=own[-1].plan,
        plan_id=own[-1].plan_id,
        launches=len(own),
        tokens_per_s=mean,
        low=max(0.0, mean - half),
        high=mean + half,
        step_s=statistics.mean(record.step_s or 0.0 for record in own),
        peak_bytes=max(peaks) or None,
        tokens_per_s_by_launch=tuple(rates),
        last=own[-1],
    )


def _pooled_spread(plans: Iterable[list[TrialRecord]]) -> tuple[float, int]:
    """Return the relative standard deviation between launches of one plan, and its freedom.

    Two launches of one finalist say next to nothing of it, so what is assumed counts as well.
    """
    squares, freedom = _ASSUMED_SPREAD**2 * _ASSUMED_FREEDOM, _ASSUMED_FREEDOM
    for own in plans:
        rates = [record.tokens_per_s or 0.0 for record in own]
        if len(rates) > 1:
            squares += statistics.variance(rates) / statistics.mean(rates) ** 2 * (len(rates) - 1)
            freedom += len(rates) - 1
    return math.sqrt(squares / freedom), freedom


def _is_tie(one: Confirmed, fastest: Confirmed, spread: float, freedom: int) -> bool:
    gap = 1 - one.tokens_per_s / fastest.tokens_per_s
    error = spread * math.sqrt(1 / one.launches + 1 / fastest.launches)
    return gap <= t_quantile_95(freedom) * error


def _name(confirmed: Confirmed) -> str:
    return f"{Plan.from_dict(confirmed.plan).describe()} ({confirmed.tokens_per_s:,.0f} tokens/s)"
