"""Times of one optimizer step's parts, synchronised with the device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from autotune.runner.gauges import Gauge


@dataclass
class StepTimes:
    """One optimizer step, in seconds."""

    micro: list[float] = field(default_factory=list)
    """Micro-steps that only accumulate."""
    sync_micro: float = 0.0
    """The micro-step that synchronises gradients."""
    optimizer: float = 0.0
    whole: float = 0.0


class StepTimer:
    """Collects the parts of each optimizer step.

    DeepSpeed runs its optimizer inside the last micro-step's backward: `optimizer_step` is then
    entered within `micro_step`, and its time is taken off the micro-step's. Elsewhere the
    optimizer part is what lies between the last micro-step's end and `end_step`: clipping, step,
    zeroing.
    """

    def __init__(self, gauge: Gauge, *, enabled: bool = True) -> None:
        self._gauge = gauge
        self._enabled = enabled
        self._current = StepTimes()
        self._step_start: float | None = None
        self._inner_optimizer_s: float | None = None
        self._last_micro_end = 0.0

    def begin(self) -> None:
        """Start the clock of the next step; called at the start of each rung."""
        self._current = StepTimes()
        self._step_start = self._gauge.now_s() if self._enabled else None

    @contextlib.contextmanager
    def micro_step(self, *, sync: bool) -> Iterator[None]:
        """Time one forward and backward."""
        if not self._enabled:
            yield
            return
        self._inner_optimizer_s = None
        start = self._gauge.now_s()
        yield
        end = self._gauge.now_s()
        taken = end - start - (self._inner_optimizer_s or 0.0)
        if sync:
            self._current.sync_micro = taken
        else:
            self._current.micro.append(taken)
        self._last_micro_end = end

    @contextlib.contextmanager
    def optimizer_step(self) -> Iterator[None]:
        """Time an optimizer step that runs inside a micro-step."""
        if not self._enabled:
            yield
            return
        start = self._gauge.now_s()
        yield
        self._inner_optimizer_s = self._gauge.now_s() - start

    def end_step(self) -> StepTimes:
        """Return the step that ended, and begin the next: a step lasts from end to end."""
        end = self._gauge.now_s()
        times = self._current
        if self._inner_optimizer_s is not None:
            times.optimizer = self._inner_optimizer_s
        else:
            times.optimizer = end - self._last_micro_end
        times.whole = end - self._step_start if self._step_start is not None else 0.0
        self._current = StepTimes()
        self._step_start = end
        return times
