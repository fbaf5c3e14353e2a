"""The estimates of the measured configurations, beside what was measured."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ranks_cases import MODELS, Case
from ranks_measured import INSTANTS, REST

from autotune.memory import MemoryEstimate, estimate_memory
from autotune.memory.setup import setup_of
from autotune.memory.table import CPU_ALLOCATOR_OVERHEAD
from autotune.memory.tensor_parallel import rank_profiles
from autotune.spec.hardware import load_hardware
from autotune.spec.model import ModelSpec, model_from_config

_PREDICTED = {
    "forward": "forward", "forward_end": "forward_end", "loss": "loss",
    "head_backward": "head_backward", "backward": "backward", "embedding_backward": "backward_end",
}  # fmt: skip
"""Measured instants that the estimate names, and its names; those of a layer's end have none."""
COMPARED = [
    *_PREDICTED, *(f"later_{name}" for name in _PREDICTED), "optimizer_step", "evaluation",
]  # fmt: skip
assert set(COMPARED) <= {*INSTANTS, *(f"later_{name}" for name in INSTANTS), *REST}
STATES = ("parameters", "optimizer")


def spec_of(architecture: str) -> ModelSpec:
    """Return the model of the cases' architecture."""
    return model_from_config(architecture, MODELS[architecture])


def trace_all(cases: Sequence[Case]) -> None:
    """Trace every profile that the cases need, an architecture at a time."""
    for architecture in dict.fromkeys(case.architecture for case in cases):
        own = [case for case in cases if case.architecture == architecture]
        spec = spec_of(architecture)
        for tp in {case.plan.tp for case in own}:
            rank_profiles(spec, [_setup(spec, c).key for c in own if c.plan.tp == tp], tp)


def _setup(spec: ModelSpec, case: Case) -> Any:
    return setup_of(spec, case.workload, case.plan, load_hardware("cpu", case.plan.world_size))


def estimate(case: Case) -> MemoryEstimate:
    """Return the estimate of a case, on CPU ranks."""
    hardware = load_hardware("cpu", case.plan.world_size)
    return estimate_memory(spec_of(case.architecture), case.workload, case.plan, hardware)


def row_of(case: Case, measured: dict[str, str]) -> dict[str, Any]:
    """Lay an estimate beside what was measured; bytes, and errors as shares of the measured."""
    found = estimate(case)
    predicted, real = found.allocator_bytes, int(measured["peak"])
    buckets = found.components["buckets"]
    row: dict[str, Any] = {
        "name": case.name, "split": case.split, "engine": case.plan.strategy,
        "ranks": case.plan.world_size, "predicted": predicted, "measured": real,
        "error": predicted / real - 1,
        "error_net_of_buckets": (predicted - buckets) / (real - buckets) - 1,
        "predicted_instant": found.peak_instant, "measured_instant": measured["peak_instant"],
        "states_and_activations": _share(found),
    }  # fmt: skip
    for name in COMPARED:
        if measured[name]:
            later = "later_" if name.startswith("later_") else ""
            short = name.removeprefix("later_")
            value = found.instants[later + _PREDICTED.get(short, short)]
            value = round(value / (1 + CPU_ALLOCATOR_OVERHEAD))
            row[f"{name}_predicted"], row[f"{name}_measured"] = value, int(measured[name])
    for name in STATES:
        # Offloaded states lie in memory all the same, so the run's own account has them there.
        if not found.components["offloaded"]:
            row[f"{name}_predicted"] = found.components[name]
            row[f"{name}_measured"] = int(measured[name])
    return row


def _share(found: MemoryEstimate) -> float:
    parts = found.components
    states = ("parameters", "optimizer", "gradients", "offloaded", "activations", "logits")
    return sum(parts[name] for name in states) / found.allocator_bytes


def columns() -> list[str]:
    """Return the columns of the result."""
    pairs = [
        f"{name}_{what}" for name in (*STATES, *COMPARED) for what in ("predicted", "measured")
    ]
    return [
        "name", "split", "engine", "ranks", "predicted", "measured", "error",
        "error_net_of_buckets", "predicted_instant", "measured_instant", "states_and_activations",
        *pairs,
    ]  # fmt: skip


def write(rows: Iterable[dict[str, Any]], file: Path) -> None:
    """Write the rows as CSV, errors to four places."""
    with file.open("w", newline="") as text:
        writer = csv.DictWriter(text, columns(), restval="", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()})


def instant_errors(rows: Sequence[dict[str, Any]], name: str) -> list[float]:
    """Return the errors of one instant, highest of a run or not; as shares of the measured."""
    predicted, measured = f"{name}_predicted", f"{name}_measured"
    return [row[predicted] / row[measured] - 1 for row in rows if predicted in row]


def figures(errors: Sequence[float]) -> dict[str, float]:
    """Return the figures of some errors."""
    sizes = np.abs(errors)
    return {
        "count": len(sizes),
        "median": float(np.median(sizes)),
        "p95": float(np.quantile(sizes, 0.95)),
        "worst_under": float(max(0.0, -min(errors))),
        "worst_over": float(max(0.0, *errors)),
    }
