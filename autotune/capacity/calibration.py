"""Correct predictions by what a study measured, on the same model and GPU type.

A factor is measured over predicted, the median in log over trials that ran to the end: of the same
engine where the study has any, else of all. It carries over what a run of this model on this GPU
has in common (how far kernels are from the assumed efficiencies), and nothing about what the study
did not contain: links between more GPUs or nodes, other sequence lengths, offload.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from autotune.errors import AutotuneError
from autotune.memory import fit_probability, verdict
from autotune.memory.estimate import MemoryEstimate, framework_bytes
from autotune.plan import Engine
from autotune.planner import Estimate
from autotune.spec.gpus import CPU
from autotune.spec.hardware import HardwareSpec
from autotune.spec.model import ModelSpec, model_from_config
from autotune.spec.workload import Workload
from autotune.timing import TimeEstimate
from autotune.trial.protocol import Outcome
from autotune.trial.record import TrialRecord

_FILES_OF_A_MODEL = {"name", "hf_config", "weights", "tokenizer"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Factors:
    """Measured over predicted."""

    tokens_per_s: float
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
        memory = _scale_memory(estimate.memory, factors.memory)
        chance = fit_probability(memory, hardware)
        return replace(
            estimate,
            memory=memory,
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


def calibrate(
    study: str,
    contract: Mapping[str, Any],
    records: Sequence[TrialRecord],
    *,
    model: ModelSpec,
    workload: Workload,
    gpu_types: Mapping[str, Sequence[str]],
) -> Calibration:
    """Derive factors from a study.

    Args:
        study: Its folder, for messages.
        contract: Its `study.json`.
        records: Its trials.
        model: The model asked about.
        workload: The workload asked about.
        gpu_types: NVML names of each GPU type asked about, by the type's name.

    Raises:
        AutotuneError: another model, a GPU nobody asked about, or no trial to learn from.
    """
    _check_model(study, contract, model)
    gpu_type = _matching_type(study, contract, gpu_types)
    ran = [r for r in records if _is_usable(r) and _plan_is_known(r)]
    if not ran:
        raise AutotuneError(
            f"{study} has no trial that ran to the end with a prediction beside it, so there is "
            "nothing to calibrate with. Go on with the search, or leave --calibrate out."
        )
    on_cpu = gpu_type == CPU
    engines = sorted({r.plan_object.engine for r in ran})
    return Calibration(
        study=study,
        gpu_type=gpu_type,
        by_engine={
            engine: _factors([r for r in ran if r.plan_object.engine is engine], engine, on_cpu)
            for engine in engines
        },
        overall=_factors(ran, None, on_cpu),
        notes=tuple(_differences(contract, workload)),
    )


def _section(contract: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = contract.get(name)
    return dict(found) if isinstance(found, dict) else {}


def _check_model(study: str, contract: Mapping[str, Any], model: ModelSpec) -> None:
    own = _section(contract, "model")
    name = own.get("name", "an unnamed model")
    if isinstance(own.get("config"), dict):
        measured = model_from_config(str(name), own["config"])
        same = measured.model_dump(exclude=_FILES_OF_A_MODEL) == model.model_dump(
            exclude=_FILES_OF_A_MODEL
        )
    else:
        same = own.get("num_parameters") == model.num_parameters
    if not same:
        raise AutotuneError(
            f"{study} measured {name}, not {model.name}: its factors hold for its own model. Give "
            f"a study of {model.name}, or leave --calibrate out."
        )


def _matching_type(
    study: str, contract: Mapping[str, Any], gpu_types: Mapping[str, Sequence[str]]
) -> str:
    device = str(_section(contract, "hardware").get("gpu", "an unknown GPU"))
    bare = device.removeprefix("NVIDIA ")
    for name, nvml_names in gpu_types.items():
        if device == name or bare in nvml_names:
            return name
    raise AutotuneError(
        f"{study} measured on {device}, which is not among --gpu-type {','.join(gpu_types)}: it "
        f"would correct no cell. Add {device} to --gpu-type, or leave --calibrate out."
    )


def _is_usable(record: TrialRecord) -> bool:
    if record.outcome is not Outcome.OK or not _memory_bytes(record):
        return False
    pair = (record.tokens_per_s, record.predicted_tokens_per_s)
    return bool(record.predicted_bytes) and all(v and math.isfinite(v) and v > 0 for v in pair)


def _plan_is_known(record: TrialRecord) -> bool:
    """Tell whether this version of autotune knows every field of the plan."""
    try:
        return record.plan_object.world_size > 0
    except (KeyError, TypeError, ValueError):
        return False


def _memory_bytes(record: TrialRecord) -> int | None:
    return record.peak_reserved_bytes or record.peak_allocated_bytes


def _factors(records: Sequence[TrialRecord], engine: Engine | None, on_cpu: bool) -> Factors:
    return Factors(
        tokens_per_s=_median_ratio(
            ((r.tokens_per_s or 0) / (r.predicted_tokens_per_s or 1)) for r in records
        ),
        memory=_median_ratio(_memory_ratio(r, on_cpu) for r in records),
        num_trials=len(records),
        engine=engine,
    )


def _memory_ratio(record: TrialRecord, on_cpu: bool) -> float:
    """Compare what the allocator took with its part of the prediction."""
    predicted = record.predicted_bytes or 0
    outside = 0 if on_cpu else framework_bytes(record.plan_object)
    return (_memory_bytes(record) or 0) / max(1, predicted - outside)


def _median_ratio(ratios: Iterable[float]) -> float:
    return math.exp(statistics.median(math.log(ratio) for ratio in ratios))


def _differences(contract: Mapping[str, Any], workload: Workload) -> list[str]:
    """Name what of the study's workload differs; factors carry over less the more there is."""
    measured = _section(contract, "workload")
    asked = workload.model_dump(mode="json")
    words = [
        f"{key} {_short(measured[key])} there, {_short(value)} here"
        for key, value in asked.items()
        if key in measured and measured[key] != value
    ]
    return [f"The study's workload differs: {'; '.join(words)}."] if words else []


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return f"r={value.get('r')}"
    return "none" if value is None else str(value)


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
