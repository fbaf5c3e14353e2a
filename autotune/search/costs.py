"""What the next measurement will cost: a launch, and the rung itself; learned as launches end."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from autotune.search.candidates import Candidates, Floats
from autotune.trial.protocol import Measurement

_FIRST_LAUNCH_S = 15.0
"""A launch before one was seen: processes, groups and a small model from a preloaded server."""


@dataclass(kw_only=True, slots=True)
class Costs:
    """Predicted seconds, corrected by what was charged."""

    measurement: Measurement = field(default_factory=Measurement)
    first_launch_s: float = _FIRST_LAUNCH_S
    _launches: list[float] = field(default_factory=list)
    _ratios: list[float] = field(default_factory=list)

    @property
    def launch_s(self) -> float:
        """Seconds from asking for a launch to its first step."""
        if not self._launches:
            return self.first_launch_s
        return float(np.median(self._launches))

    def rung_s(self, candidates: Candidates, log_rate: Floats) -> Floats:
        """Seconds of each rung once its launch runs.

        Args:
            candidates: The rungs.
            log_rate: What is believed of their log tokens/s by now.
        """
        step_s = candidates.predicted_step_s * np.exp(candidates.log_rate - log_rate)
        return self._factor * planned_rung_s(self.measurement, step_s, candidates.grad_accum_steps)

    @property
    def _factor(self) -> float:
        return math.exp(float(np.mean(self._ratios))) if self._ratios else 1.0

    def learn(self, charged_s: float, planned_s: float, *, opened: bool) -> None:
        """Take in what a rung was charged.

        Args:
            charged_s: Seconds; those of its launch as well where it was the launch's first.
            planned_s: What `planned_rung_s` says of its measured step.
            opened: Whether it was the launch's first.
        """
        if opened:
            self._launches.append(max(0.1, charged_s - self._factor * planned_s))
        elif charged_s > 0 and planned_s > 0:
            self._ratios.append(math.log(charged_s / planned_s))


def planned_rung_s(measurement: Measurement, step_s: Floats, grad_accum_steps: Floats) -> Floats:
    """Return the seconds the steps of a rung take, by the rules of `Measurement`.

    An accumulation measured directly is measured alone; a larger one is composed from 1 and 2.
    """
    direct = np.minimum(grad_accum_steps, measurement.max_direct_accumulation)
    own = step_s / grad_accum_steps * np.where(grad_accum_steps > direct, 2, direct)
    single = np.where(grad_accum_steps > direct, step_s / grad_accum_steps, 0.0)
    total: Floats = _segment_s(measurement, own) + np.where(
        single > 0, _segment_s(measurement, single), 0.0
    )
    return total


def _segment_s(measurement: Measurement, step_s: Floats) -> Floats:
    steps = np.ceil(measurement.target_seconds / np.maximum(step_s, 1e-6))
    steps = np.clip(steps, measurement.min_steps, measurement.max_steps)
    seconds: Floats = (measurement.warmup_steps + steps) * step_s
    return seconds
