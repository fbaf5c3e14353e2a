"""The micro-batch ladder: many (micro batch, accumulation) rungs inside one `Trainer.train()`.

A rung is an epoch of the Trainer. At an epoch's start the Trainer calls `set_epoch` on the loader,
before it reads the accumulation; ending the epoch early starts the next rung. So the loop that is
measured is the Trainer's own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from autotune.plan import Engine
from autotune.runner.data.loader import RankLoader
from autotune.runner.gauges import Gauge
from autotune.runner.orders import Orders
from autotune.runner.timers import StepTimer, StepTimes
from autotune.runner.trainer import AutotuneTrainer
from autotune.trial.protocol import (
    AccumulationResult,
    Measurement,
    Outcome,
    Rung,
    RungOrder,
    RungResult,
)
from autotune.trial.steps import Enough, enough


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """One accumulation of one rung: what a single Trainer epoch measures."""

    micro_batch_size: int
    grad_accum_steps: int
    last_of_rung: bool


def segments_of(rung: Rung, measurement: Measurement) -> list[Segment]:
    """Return a rung's segments: its own accumulation, or 1 and 2 where that is too long to measure.

    Inside a step, micro-steps with and without synchronisation and the optimizer are told apart,
    so that nothing is measured besides the plan's own accumulation while that is small.
    """
    direct = rung.grad_accum_steps <= measurement.max_direct_accumulation
    accumulations = [rung.grad_accum_steps] if direct else [1, 2]
    return [
        Segment(
            micro_batch_size=rung.micro_batch_size,
            grad_accum_steps=accumulation,
            last_of_rung=accumulation == accumulations[-1],
        )
        for accumulation in accumulations
    ]


class LadderLoader:
    """An endless loader whose micro batch and accumulation follow the current segment."""

    def __init__(
        self,
        loader: RankLoader,
        start_segment: Callable[[int], Segment],
        *,
        sequence_tokens: float,
    ) -> None:
        """Read from a loader.

        Args:
            loader: whose sequences.
            start_segment: begins a segment, by its number.
            sequence_tokens: mean valid tokens of the data's sequences.
        """
        self._loader = loader
        self._start_segment = start_segment
        self._sequence_tokens = sequence_tokens

    @property
    def mean_step_tokens(self) -> float:
        """Valid tokens of a step at the present split, were its sequences the data's average."""
        return self._sequence_tokens * self._loader.global_batch_size

    def set_epoch(self, epoch: int) -> None:
        """Begin segment number `epoch`; called by the Trainer at the start of each epoch."""
        segment = self._start_segment(epoch)
        self._loader.reconfigure(segment.micro_batch_size, segment.grad_accum_steps)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return iter(self._loader)


class Ladder(TrainerCallback):
    """Decides how long each segment measures and hands finished rungs to `report`."""

    def __init__(
        self,
        orders: Orders,
        measurement: Measurement,
        *,
        timer: StepTimer,
        gauge: Gauge,
        report: Callable[[RungResult], None],
        progress: Callable[[], None],
        first_step: Callable[[], None],
    ) -> None:
        self._orders = orders
        self._measurement = measurement
        self.timer = timer
        self._gauge = gauge
        self._report = report
        self._progress = progress
        self._first_step = first_step
        self._order: RungOrder | None = None
        self._ahead: list[Segment] = []
        self._segment: Segment | None = None
        self._warmup_s: list[float] = []
        self._steps: list[StepTimes] = []
        self._slowest: list[_Slowest] = []
        self._tokens: list[int] = []
        self._finished: list[AccumulationResult] = []
        self._rung_started = 0.0
        self.trainer: AutotuneTrainer | None = None

    @property
    def current(self) -> Segment:
        """The segment under way, or the last one; before the first, that one."""
        return self._segment or self._ahead[0]

    @property
    def finished_of_current_rung(self) -> list[AccumulationResult]:
        """What the unfinished rung has measured so far."""
        return list(self._finished)

    def next_rung(self) -> bool:
        """Take the next rung's segments; return whether there is one. It may have to wait."""
        self._order = self._orders.next()
        if self._order is None or self._order.rung is None:
            return False
        self._ahead = segments_of(self._order.rung, self._measurement)
        return True

    def start_segment(self, epoch: int) -> Segment:
        """Set the accumulation where it is read, and reset clock and peak.

        Accelerate's own stays 1, as the Trainer sets it: its `backward` divides by it, and the loss
        is normalised over the whole step already.
        """
        trainer = self.trainer
        assert trainer is not None
        if not self._ahead and not self.next_rung():
            raise ValueError("a ladder needs a rung")
        starts_rung = self._segment is None or self._segment.last_of_rung
        segment = self._segment = self._ahead.pop(0)
        trainer.args.gradient_accumulation_steps = segment.grad_accum_steps
        if trainer.plan.engine is Engine.DEEPSPEED:
            _set_deepspeed_batch(trainer.model_wrapped, segment)
        self._warmup_s, self._steps, self._slowest, self._tokens = [], [], [], []
        self._gauge.reset()
        self._first_step()
        if starts_rung:
            self._rung_started = time.perf_counter()
        self.timer.begin()
        return segment

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> TrainerControl:
        """Count the step; end the segment when it has enough of them."""
        times = self.timer.end_step()
        trainer = self.trainer
        assert trainer is not None
        self._progress()
        slowest = _slowest_of_all(times)
        if len(self._warmup_s) < self._measurement.warmup_steps:
            self._warmup_s.append(slowest.whole)
        else:
            self._steps.append(times)
            self._slowest.append(slowest)
            self._tokens.append(trainer.step_tokens)
            done = self._enough()
            if done is not None:
                self._end_segment(done)
                control.should_epoch_stop = True
                if not self._ahead:
                    control.should_training_stop = not self.next_rung()
                return control
        self.timer.begin()  # what was agreed on here is no part of a step
        return control

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        """Tell of progress: a step may hold many micro-steps."""
        self._progress()

    def _enough(self) -> Enough | None:
        """Say whether the segment may end; all ranks have the same numbers, so all agree."""
        order, segment = self._order, self.current
        assert order is not None and order.rung is not None
        give_up, missing = None, 0.0
        if segment.last_of_rung:  # before that, nothing says how long the plan's step is
            give_up = order.give_up_step_s
            lacking = order.rung.grad_accum_steps - segment.grad_accum_steps
            missing = lacking * min(step.micro for step in self._slowest)
        return enough(
            [step.whole for step in self._slowest],
            self._measurement,
            give_up_step_s=give_up,
            missing_s=missing,
        )

    def _mean_step_tokens(self) -> float:
        trainer = self.trainer
        assert trainer is not None
        tokens: float = trainer.loader.mean_step_tokens
        return tokens

    def _end_segment(self, done: Enough) -> None:
        segment, peak = self.current, self._gauge.read()
        steps = self._steps[done.dropped :]
        warmup = [*self._warmup_s, *(step.whole for step in self._slowest[: done.dropped])]
        self._finished.append(
            AccumulationResult(
                grad_accum_steps=segment.grad_accum_steps,
                step_s=[step.whole for step in steps],
                micro_step_s=[micro for step in steps for micro in step.micro],
                sync_micro_step_s=[step.sync_micro for step in steps],
                optimizer_step_s=[step.optimizer for step in steps],
                valid_tokens=self._tokens[done.dropped :],
                warmup_s=warmup,
                mean_step_tokens=self._mean_step_tokens(),
                peak_allocated_bytes=peak.allocated_bytes,
                peak_reserved_bytes=peak.reserved_bytes,
                alloc_retries=peak.alloc_retries,
                device_used_bytes=peak.device_used_bytes,
                device_total_bytes=peak.device_total_bytes,
            )
        )
        if segment.last_of_rung:
            self._report(
                RungResult(
                    micro_batch_size=segment.micro_batch_size,
                    outcome=Outcome.OK,
                    accumulations=self._finished,
                    cut_short=done.cut_short,
                    wall_s=time.perf_counter() - self._rung_started,
                )
            )
            self._finished = []


@dataclass(frozen=True, kw_only=True, slots=True)
class _Slowest:
    """A step as the slowest rank had it, in seconds; the same on every rank."""

    whole: float
    micro: float
    """Its shortest micro-step without synchronisation; 0 at accumulation 1."""


def _slowest_of_all(times: StepTimes) -> _Slowest:
    values = torch.tensor([times.whole, min(times.micro, default=0.0)], dtype=torch.float64)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)  # on the host: gloo, on CUDA as well
    whole, micro = values.tolist()
    return _Slowest(whole=whole, micro=micro)


def _set_deepspeed_batch(engine: Any, segment: Segment) -> None:
    """Tell DeepSpeed the accumulation: its offload path overwrites gradients when it believes 1."""
    engine.set_train_micro_batch_size(segment.micro_batch_size)
    world = engine.dp_world_size
    engine.set_train_batch_size(segment.micro_batch_size * segment.grad_accum_steps * world)
    engine.optimizer.gradient_accumulation_steps = segment.grad_accum_steps
