"""The micro-batch ladder: many (micro batch, accumulation) rungs inside one `Trainer.train()`.

A rung is an epoch of the Trainer. At an epoch's start the Trainer calls `set_epoch` on the loader,
before it reads the accumulation; ending the epoch early starts the next rung. So the loop that is
measured is the Trainer's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from autotune.plan import Engine
from autotune.runner.data.loader import RankLoader
from autotune.runner.gauges import Gauge
from autotune.runner.timers import StepTimer, StepTimes
from autotune.runner.trainer import AutotuneTrainer
from autotune.trial.protocol import (
    AccumulationResult,
    Measurement,
    Outcome,
    Rung,
    RungResult,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """One accumulation of one rung: what a single Trainer epoch measures."""

    micro_batch_size: int
    grad_accum_steps: int
    last_of_rung: bool


def segments_of(rungs: list[Rung], measurement: Measurement) -> list[Segment]:
    """Return the ladder's segments: each micro batch at accumulation 1 and at one of 2 or more.

    A plan whose own accumulation is 1 is measured at 1 alone: more would hold gradients between
    micro-steps, and its running out of memory would say nothing about the plan.
    """
    segments = []
    for rung in rungs:
        if rung.grad_accum_steps == 1:
            segments.append(
                Segment(
                    micro_batch_size=rung.micro_batch_size, grad_accum_steps=1, last_of_rung=True
                )
            )
            continue
        direct = 2 <= rung.grad_accum_steps <= measurement.max_direct_accumulation
        larger = rung.grad_accum_steps if direct else 2
        segments += [
            Segment(micro_batch_size=rung.micro_batch_size, grad_accum_steps=1, last_of_rung=False),
            Segment(
                micro_batch_size=rung.micro_batch_size, grad_accum_steps=larger, last_of_rung=True
            ),
        ]
    return segments


class LadderLoader:
    """An endless loader whose micro batch and accumulation follow the current segment."""

    def __init__(self, loader: RankLoader, start_segment: Callable[[int], Segment]) -> None:
        self._loader = loader
        self._start_segment = start_segment
        self._sequence_tokens = loader.mean_sequence_tokens()

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
        rungs: list[Rung],
        measurement: Measurement,
        *,
        timer: StepTimer,
        gauge: Gauge,
        report: Callable[[RungResult], None],
        progress: Callable[[], None],
        first_step: Callable[[], None],
    ) -> None:
        self._first_step = first_step
        self._segments = segments_of(rungs, measurement)
        self._measurement = measurement
        self.timer = timer
        self._gauge = gauge
        self._report = report
        self._progress = progress
        self._index = 0
        self._steps: list[StepTimes] = []
        self._tokens: list[int] = []
        self._seen = 0
        self._wanted = 0
        self._finished: list[AccumulationResult] = []
        self.trainer: AutotuneTrainer | None = None

    @property
    def current(self) -> Segment:
        """The segment under way (the last one when all are done)."""
        return self._segments[min(self._index, len(self._segments) - 1)]

    @property
    def finished_of_current_rung(self) -> list[AccumulationResult]:
        """What the unfinished rung has measured so far."""
        return list(self._finished)

    def start_segment(self, epoch: int) -> Segment:
        """Set the accumulation where it is read, and reset clock and peak.

        Accelerate's own stays 1, as the Trainer sets it: its `backward` divides by it, and the loss
        is normalised over the whole step already.
        """
        trainer = self.trainer
        assert trainer is not None
        self._index = epoch
        segment = self.current
        trainer.args.gradient_accumulation_steps = segment.grad_accum_steps
        if trainer.plan.engine is Engine.DEEPSPEED:
            _set_deepspeed_batch(trainer.model_wrapped, segment)
        self._steps, self._tokens, self._seen = [], [], 0
        self._wanted = self._measurement.max_steps
        self._gauge.reset()
        self._first_step()
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
        self._seen += 1
        self._progress()
        if self._seen <= self._measurement.warmup_steps:
            self._wanted = self._steps_wanted(times.whole)
            self.timer.begin()
            return control
        self._steps.append(times)
        self._tokens.append(trainer.step_tokens)
        if len(self._steps) >= self._wanted:
            self._end_segment()
            control.should_epoch_stop = True
            control.should_training_stop = self._index + 1 >= len(self._segments)
        return control

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        """Tell of progress: a step may hold many micro-steps."""
        self._progress()

    def _steps_wanted(self, warmup_step_s: float) -> int:
        """Return how many steps to count, agreed by all ranks (the slowest decides)."""
        slowest = torch.tensor(warmup_step_s, dtype=torch.float64)
        if dist.is_initialized() and dist.get_world_size() > 1:
            slowest = slowest.to(self.trainer.args.device).float()  # type: ignore[union-attr]
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        wanted = math.ceil(self._measurement.target_seconds / max(1e-6, float(slowest)))
        return max(self._measurement.min_steps, min(self._measurement.max_steps, wanted))

    def _mean_step_tokens(self) -> float:
        trainer = self.trainer
        assert trainer is not None
        tokens: float = trainer.loader.mean_step_tokens
        return tokens

    def _end_segment(self) -> None:
        segment, peak = self.current, self._gauge.read()
        self._finished.append(
            AccumulationResult(
                grad_accum_steps=segment.grad_accum_steps,
                step_s=[step.whole for step in self._steps],
                micro_step_s=[micro for step in self._steps for micro in step.micro],
                sync_micro_step_s=[step.sync_micro for step in self._steps],
                optimizer_step_s=[step.optimizer for step in self._steps],
                valid_tokens=self._tokens,
                mean_step_tokens=self._mean_step_tokens(),
                peak_allocated_bytes=peak.allocated_bytes,
                peak_reserved_bytes=peak.reserved_bytes,
                alloc_retries=peak.alloc_retries,
                device_used_bytes=peak.device_used_bytes,
            )
        )
        if segment.last_of_rung:
            self._report(
                RungResult(
                    micro_batch_size=segment.micro_batch_size,
                    outcome=Outcome.OK,
                    accumulations=self._finished,
                )
            )
            self._finished = []


def _set_deepspeed_batch(engine: Any, segment: Segment) -> None:
    """Tell DeepSpeed the accumulation: its offload path overwrites gradients when it believes 1."""
    engine.set_train_micro_batch_size(segment.micro_batch_size)
    world = engine.dp_world_size
    engine.set_train_batch_size(segment.micro_batch_size * segment.grad_accum_steps * world)
    engine.optimizer.gradient_accumulation_steps = segment.grad_accum_steps
