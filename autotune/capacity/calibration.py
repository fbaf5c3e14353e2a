"""Correct predictions by what a study measured, on the same model and GPU type.

A factor is measured over predicted, the median in log over trials that ran to the end: of the same
engine where the study has any, else of all. The prediction is made anew, by the formulas and the
GPU entry the cells use: the one in the study may be another version's, or that of a stand-in GPU.
Speeds are compared by the seconds of a step, since measured tokens are those with a label and
predicted ones all. A factor carries over what a run of this model on this GPU has in common (how
far kernels are from the assumed efficiencies), and nothing about what the study did not contain:
links between more GPUs or nodes, other sequence lengths, offload.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from autotune.capacity.comparable import (
    check_model,
    differences,
    matching_type,
    measured_workload,
)
from autotune.errors import AutotuneError
from autotune.memory import fit_probability, verdict
from autotune.memory.estimate import MemoryEstimate, framework_bytes
from autotune.plan import Engine
from autotune.planner import Estimate, estimate_plan
from autotune.spec.hardware import HardwareSpec, load_hardware
from autotune.spec.model import ModelSpec
from autotune.spec.workload import Workload
from autotune.timing import TimeEstimate
from autotune.trial.protocol import Outcome
from autotune.trial.record import TrialRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class Factors:
    """Measured over predicted."""

    tokens_per_s: float
    """The predicted over the measured seconds of a step."""
    memory: float
    """Of the allocator's bytes: what a process takes outside it is left as predicted."""
    num_trials: int
    engine: Engine | None
    """Whose trials they are; None: of every engine."""

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "tokens_per_s_factor": self.tokens_per_s,
            "memory_factor": self.memory,
            "num_trials": self.num_trials,
            "engine": str(self.engine) if self.engine else None,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """The factors of one study."""

    study: str
    gpu_type: str
    """As the question names it."""
    by_engine: Mapping[Engine, Factors]
    overall: Factors
    notes: tuple[str, ...]
    """What the study and the question do not have in common."""

    def factors(self, engine: Engine) -> Factors:
        """Return the engine's own factors, or those of all trials."""
        return self.by_engine.get(engine, self.overall)

    def apply(self, estimate: Estimate, hardware: HardwareSpec) -> Estimate:
        """Scale time and memory, and judge anew whether it fits."""
        factors = self.factors(estimate.plan.engine)
        # The factor is the correction: a residual's own would be a second one.
        residual = replace(estimate.peak.residual, bias=0.0)
        framework = estimate.peak.framework_bytes
        total = round(estimate.peak.measurable_bytes * factors.memory) + framework
        peak = replace(estimate.peak, total_bytes=total, residual=residual)
        chance = fit_probability(peak, hardware)
        return replace(
            estimate,
            peak=peak,
            breakdown=lambda: _scale_memory(estimate.memory, factors.memory),
            time=_scale_time(estimate.time, 1 / factors.tokens_per_s),
            fit_probability=chance,
            verdict=verdict(chance),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "study": self.study,
            "gpu_type": self.gpu_type,
            "engines": {str(key): value.to_dict() for key, value in self.by_engine.items()},
            "overall": self.overall.to_dict(),
            "notes": list(self.notes),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class _Measured:
    """A trial that ran to the end, and what is predicted of its plan today."""

    engine: Engine
    speed: float
    memory: float


def calibrate(
    study: str,
    contract: Mapping[str, Any],
    records: Sequence[TrialRecord],
    *,
    model: ModelSpec,
    workload: Workload,
    gpu_types: Mapping[str, str],
    nvml_names: Mapping[str, Sequence[str]],
) -> Calibration:
    """Derive factors from a study.

    Args:
        study: Its folder, for messages.
        contract: Its `study.json`.
        records: Its trials.
        model: The model asked about.
        workload: The workload asked about.
        gpu_types: What `load_hardware` takes, by the name of each GPU type asked about.
        nvml_names: What NVML calls each of them.

    Raises:
        AutotuneError: another model, GPU, precision, adapter or packing than asked about, or no
            trial to learn from.
    """
    check_model(study, contract, model)
    gpu_type = matching_type(study, contract, nvml_names)
    measured = measured_workload(study, contract, workload)
    ran = [r for r in records if _is_usable(r) and _plan_is_known(r)]
    if not ran:
        raise AutotuneError(
            f"{study} has no trial that ran to the end, so there is nothing to calibrate with. Go "
            "on with the search, or leave --calibrate out."
        )
    trials = _predict(ran, model, measured, gpu_types[gpu_type])
    return Calibration(
        study=study,
        gpu_type=gpu_type,
        by_engine={
            engine: _factors([t for t in trials if t.engine is engine], engine)
            for engine in sorted({t.engine for t in trials})
        },
        overall=_factors(trials, None),
        notes=tuple(differences(measured, workload)),
    )


def _is_usable(record: TrialRecord) -> bool:
    if record.outcome is not Outcome.OK or not _memory_bytes(record):
        return False
    seconds = record.step_s
    return seconds is not None and math.isfinite(seconds) and seconds > 0


def _plan_is_known(record: TrialRecord) -> bool:
    """Tell whether this version of autotune knows every field of the plan."""
    try:
        return record.plan_object.world_size > 0
    except (KeyError, TypeError, ValueError):
        return False


def _memory_bytes(record: TrialRecord) -> int | None:
    return record.peak_reserved_bytes or record.peak_allocated_bytes


def _predict(
    records: Sequence[TrialRecord], model: ModelSpec, workload: Workload, gpu_type: str
) -> list[_Measured]:
    """Set each trial against today's prediction of its plan on a machine of the GPU type."""
    machines: dict[int, HardwareSpec] = {}
    found = []
    for record in records:
        plan = record.plan_object
        if plan.world_size not in machines:
            machines[plan.world_size] = load_hardware(gpu_type, plan.world_size, one_node=True)
        hardware = machines[plan.world_size]
        estimate = estimate_plan(model, workload, plan, hardware)
        outside = 0 if hardware.gpu.is_cpu else framework_bytes(plan)
        allocated = max(1, estimate.peak.total_bytes - outside)
        found.append(
            _Measured(
                engine=plan.engine,
                speed=estimate.time.step_s / (record.step_s or math.nan),
                memory=(_memory_bytes(record) or 0) / allocated,
            )
        )
    return found


def _factors(trials: Sequence[_Measured], engine: Engine | None) -> Factors:
    return Factors(
        tokens_per_s=_median_ratio(trial.speed for trial in trials),
        memory=_median_ratio(trial.memory for trial in trials),
        num_trials=len(trials),
        engine=engine,
    )


def _median_ratio(ratios: Iterable[float]) -> float:
    return math.exp(statistics.median(math.log(ratio) for ratio in ratios))


def _scale_memory(memory: MemoryEstimate, factor: float) -> MemoryEstimate:
    framework = memory.components.get("framework", 0)
    components = {
        name: value if name == "framework" else round(value * factor)
        for name, value in memory.components.items()
    }
    instants = {
        name: round((value - framework) * factor) + framework
        for name, value in memory.instants.items()
    }
    return replace(memory, components=components, instants=instants)


def _scale_time(time: TimeEstimate, factor: float) -> TimeEstimate:
    scaled: dict[str, Any] = {name: value * factor for name, value in time.components.items()}
    return replace(time, **scaled)
