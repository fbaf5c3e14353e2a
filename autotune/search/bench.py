"""What the search loop measures on: real launches, or a recorded landscape.

The loop sees only these two protocols, so that a replay runs the very code of a real search.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from autotune.planner import Estimate
from autotune.search.space import Family
from autotune.trial.record import TrialRecord


class Launch(Protocol):
    """One start of all ranks of a family, under way."""

    @property
    def family(self) -> Family:
        """What it measures."""
        ...

    @property
    def alive(self) -> bool:
        """False once a rung failed, or the ranks died: nothing more can be measured."""
        ...

    def measure(
        self, estimate: Estimate, *, give_up_step_s: float | None = None
    ) -> TrialRecord | None:
        """Measure one rung; the micro batch must be above those measured before.

        Args:
            estimate: A rung of the family.
            give_up_step_s: A rung that is surely slower than this many seconds a step may end
                early; its record then rests on fewer steps.

        Returns:
            The record, or None where the launch was interrupted and the rung says nothing.
        """
        ...

    def close(self) -> None:
        """End the ranks."""
        ...


class Bench(Protocol):
    """Where launches are made, and the clock that they are charged to."""

    def open(self, family: Family, planned: Sequence[Estimate]) -> Launch:
        """Start a launch.

        Args:
            family: What to launch.
            planned: The rungs it may be asked for, ascending; not all need to be.
        """
        ...

    @property
    def spent_s(self) -> float:
        """Seconds charged so far: wall clock, or simulated."""
        ...
