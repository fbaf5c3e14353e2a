"""What is predicted of a plan: memory, time, the chance to fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from autotune.memory import (
    MemoryEstimate,
    Verdict,
    estimate_memory,
    estimate_memory_table,
    fit_probability,
    verdict,
)
from autotune.memory.knowledge import model_key
from autotune.memory.peak import Peak
from autotune.memory.residuals import Residual, Residuals, ruler_of
from autotune.memory.verdict import judge_table
from autotune.plan import Plan
from autotune.rules import Violation, check_plan
from autotune.spec.hardware import HardwareSpec, check_precision
from autotune.spec.model import ModelSpec
from autotune.spec.workload import Workload
from autotune.timing import Calibration, TimeEstimate, estimate_time, estimate_time_table


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What is predicted of one plan."""

    plan: Plan
    peak: Peak
    time: TimeEstimate
    verdict: Verdict
    fit_probability: float
    violations: tuple[Violation, ...] = ()
    breakdown: Callable[[], MemoryEstimate] = field(repr=False, compare=False)
    """Makes `memory`, apart from its residual: most plans of a space are never looked at so."""

    @cached_property
    def memory(self) -> MemoryEstimate:
        """The peak with its components, and the other instants."""
        return replace(self.breakdown(), residual=self.peak.residual)

    def to_dict(self, model: ModelSpec) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "model": model.name,
            "plan": self.plan.to_dict(),
            "world_size": self.plan.world_size,
            "memory": self.memory.to_dict(),
            "time": self.time.to_dict(),
            "verdict": str(self.verdict),
            "fit_probability": self.fit_probability,
            "violations": [
                {"code": v.code, "message": v.message, "hint": v.hint} for v in self.violations
            ],
        }


def estimate_plan(
    model: ModelSpec,
    workload: Workload,
    plan: Plan,
    hardware: HardwareSpec,
    residuals: Residuals | None = None,
    calibration: Calibration | None = None,
) -> Estimate:
    """Check and estimate one plan; a broken rule is reported in `violations`, not raised.

    Args:
        model: The model.
        workload: What every configuration does alike.
        plan: The configuration.
        hardware: Where it runs.
        residuals: How far real memory lies from the predicted (`memory.knowledge.residuals_for`);
            None takes the committed records alone.
        calibration: What was measured of the hardware's speed; None predicts by formula.

    Raises:
        AutotuneError: the device has no matrix units for the workload's precision.
    """
    check_precision(hardware.gpu, workload.precision)
    violations = check_plan(plan, model, workload, hardware)
    memory = predict_memory(model, workload, plan, hardware, residuals)
    chance = fit_probability(memory, hardware)
    return Estimate(
        plan=plan,
        peak=memory.peak,
        time=estimate_time(model, workload, plan, hardware, calibration),
        verdict=verdict(chance),
        fit_probability=chance,
        violations=tuple(violations),
        breakdown=lambda: memory,
    )


def predict_memory(
    model: ModelSpec,
    workload: Workload,
    plan: Plan,
    hardware: HardwareSpec,
    residuals: Residuals | None = None,
) -> MemoryEstimate:
    """Estimate the memory of one plan, with the residual of its kind; see `estimate_plan`."""
    memory = estimate_memory(model, workload, plan, hardware)
    if residuals is None:
        return memory
    residual = residuals.predict(plan, model_key(model), memory.peak.measurable_bytes)
    return replace(memory, residual=residual)


def judged(estimate: Estimate, hardware: HardwareSpec, residual: Residual) -> Estimate:
    """Return an estimate under another residual."""
    peak = replace(estimate.peak, residual=residual)
    chance = fit_probability(peak, hardware)
    return replace(estimate, peak=peak, fit_probability=chance, verdict=verdict(chance))


def estimate_plans(
    model: ModelSpec,
    workload: Workload,
    plans: Sequence[Plan],
    hardware: HardwareSpec,
    residuals: Residuals | None,
    calibration: Calibration | None,
) -> list[Estimate]:
    """Estimate legal plans: their memory all at once, its components only where asked for."""
    if not plans:
        return []
    check_precision(hardware.gpu, workload.precision)
    residuals = residuals or Residuals.known(ruler_of(on_cpu=hardware.gpu.is_cpu))
    table = estimate_memory_table(model, workload, plans, hardware)
    times = estimate_time_table(model, workload, table.columns, hardware, calibration)
    found = judge_table(table, hardware, residuals, model_key(model))
    return [
        Estimate(
            plan=plan,
            peak=found.peak(position),
            time=times.estimate(position),
            verdict=verdict(float(found.fit_probability[position])),
            fit_probability=float(found.fit_probability[position]),
            breakdown=partial(estimate_memory, model, workload, plan, hardware),
        )
        for position, plan in enumerate(plans)
    ]
