"""What every launch of a study has in common, and the request and limits that follow from it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from autotune.plan import Plan
from autotune.planner import Estimate
from autotune.search.space import Family
from autotune.spec.training import DatasetSource
from autotune.spec.workload import Workload
from autotune.trial.launch import Limits
from autotune.trial.protocol import Measurement, ModelSource, Request, Rung
from autotune.trial.record import TrialRecord

_START_S = {"cpu": 90.0, "cuda": 180.0}
"""Imports, process groups and a small model; larger models add to it."""
_LOAD_BYTES_PER_S = 0.5e9
_SAVE_BYTES_PER_S = 0.1e9
"""Of a checkpoint, at the slowest that is still waited for: a shared file system under load."""
_SAFETY = 8.0
"""How many times its predicted time a launch may take: the first time model is rough."""
_HANG_S = 120.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What every launch of a study has in common."""

    model: ModelSource
    num_parameters: int
    workload: Workload
    device: str
    memory_limit_bytes: int | None
    datasets: Sequence[DatasetSource]
    measurement: Measurement
    seed: int = 42
    trial_timeout_s: float | None = None
    """Deadline of a launch; None derives it from the predicted time."""

    def request(self, first: Plan, rungs: Sequence[Rung], folder: Path) -> Request:
        """Return the request of a launch; `first` is the plan of its first rung."""
        return Request(
            launch_id=folder.name,
            mode="trial",
            model=self.model,
            plan=first.to_dict(),
            workload=self.workload,
            device="cuda" if self.device == "cuda" else "cpu",
            out_dir=str(folder),
            rungs=list(rungs),
            measurement=self.measurement,
            memory_limit_bytes=self.memory_limit_bytes,
            datasets=list(self.datasets),
            seed=self.seed,
        )

    def limits(
        self, family: Family, rungs: Sequence[Estimate], budget_ends: float | None
    ) -> Limits:
        """Return when a launch of these rungs is given up.

        Args:
            family: What is launched.
            rungs: What it measures.
            budget_ends: `time.monotonic()` at which the search's budget ends.
        """
        if self.trial_timeout_s is not None:
            deadline = self.trial_timeout_s
        else:
            deadline = self.start_s + sum(self.rung_limit_s(estimate) for estimate in rungs)
        if budget_ends is not None:
            deadline = min(deadline, max(1.0, budget_ends - time.monotonic()))
        slowest = max(e.time.step_s / e.plan.grad_accum_steps for e in family.ladder)
        return Limits(deadline_s=deadline, hang_s=max(_HANG_S, _SAFETY * slowest))

    def confirming_limits(
        self, family: Family, finalist: TrialRecord, budget_ends: float | None
    ) -> Limits:
        """Return when a confirming launch is given up: it runs the true accumulation, and saves.

        Args:
            family: What is launched.
            finalist: Its record of the search, for its step.
            budget_ends: As in `limits`.
        """
        ordinary = self.limits(family, [], budget_ends)
        step_s = finalist.step_s or 0.0
        # Weights and both moments in fp32, and the evaluation counts as one more step.
        save_s = self.num_parameters * 12 / _SAVE_BYTES_PER_S
        steps = self.measurement.warmup_steps + self.measurement.min_steps + 1
        own_s = self.start_s + _SAFETY * (steps * step_s + self.measurement.target_seconds) + save_s
        deadline = max(self.trial_timeout_s or 0.0, own_s)
        if budget_ends is not None:
            deadline = min(deadline, max(1.0, budget_ends - time.monotonic()))
        return Limits(deadline_s=deadline, hang_s=ordinary.hang_s + save_s)

    @property
    def start_s(self) -> float:
        """Seconds a launch may take to its first step."""
        return _START_S[self.device] + self.num_parameters * 4 / _LOAD_BYTES_PER_S

    def rung_limit_s(self, estimate: Estimate) -> float:
        """Seconds a rung may take."""
        micro_s = estimate.time.step_s / estimate.plan.grad_accum_steps
        steps = self.measurement.warmup_steps + self.measurement.min_steps
        # Accumulation 1 and up to 4 (see runner.ladder), plus the time a rung may fill.
        return _SAFETY * (5 * steps * micro_s + 2 * self.measurement.target_seconds)


def rung_of(plan: Plan) -> Rung:
    """Return the rung that measures a plan."""
    return Rung(micro_batch_size=plan.micro_batch_size, grad_accum_steps=plan.grad_accum_steps)


def plan_of(request: Request, rung: Rung) -> Plan:
    """Return the plan that a rung of a request measures."""
    return replace(
        request.plan_object(),
        micro_batch_size=rung.micro_batch_size,
        grad_accum_steps=rung.grad_accum_steps,
    )
