"""What decides the next measurement, as the loop sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from autotune.planner import Estimate
from autotune.search.space import Family
from autotune.trial.record import TrialRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class Offer:
    """What the loop can measure now."""

    rungs: Mapping[str, Sequence[Estimate]]
    """By family, ascending: not measured and not ruled out, as judged by now; never empty."""
    running: str | None = None
    """Family of the launch under way, if one is."""
    above: int = 0
    """Micro batch that launch has reached: only larger ones are within its reach."""

    def reachable(self) -> list[Estimate]:
        """Return the rungs that the launch under way can still measure."""
        rungs = self.rungs.get(self.running, ()) if self.running else ()
        return [rung for rung in rungs if rung.plan.micro_batch_size > self.above]


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """The next rung to measure."""

    family: Family
    estimate: Estimate
    planned: tuple[Estimate, ...]
    """The rungs a launch opened for it may be asked for, ascending; begins with `estimate`."""
    give_up_step_s: float | None = None
    """A rung surely slower than this cannot matter any more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stop:
    """Nothing more is worth measuring."""

    because: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Charge:
    """What a record cost."""

    seconds: float
    opened: bool
    """Whether the start of its launch is part of that."""


class Policy(Protocol):
    """Decides what to measure next; learns what every rung gave."""

    def ask(self, offer: Offer) -> Asked | Stop:
        """Return the next rung, one of the offer's."""
        ...

    def tell(self, family: Family, record: TrialRecord, charge: Charge) -> None:
        """Take in a measured rung."""
        ...

    def abandon(self, family: Family) -> None:
        """A launch of the family ended: what it was asked for and did not reach will not come."""
        ...
