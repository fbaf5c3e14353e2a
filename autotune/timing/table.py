"""`estimate_time_table`: one optimizer step of many plans at once, a layout at a time.

Formulas and sources: docs/formulas.md and docs/time.md. Without a calibration the efficiencies are
assumptions that rank plans until measured trials correct them; no figure here was fitted to this
project's runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from autotune.memory.columns import PlanColumns
from autotune.plan import Plan, Recompute
from autotune.spec.hardware import HardwareSpec
from autotune.spec.model import ModelSpec
from autotune.spec.model.part import tensor_part
from autotune.spec.workload import Workload
from autotune.timing.calibration import Calibration
from autotune.timing.compute import compute_of, layouts
from autotune.timing.engine import engine_extra, exchange_tried
from autotune.timing.estimate import (
    COMPONENTS,
    NO_COLD_START,
    ColdStart,
    TimeEstimate,
    TimeTable,
)
from autotune.timing.flops import model_flops_per_token
from autotune.timing.links import Links
from autotune.timing.optimizer import optimizer_of
from autotune.timing.traffic import traffic_of

Array = NDArray[np.float64]

# Starting one eager PyTorch kernel from Python, and how many a layer's forward starts in
# transformers (norms, rotary embedding, projections, attention, SwiGLU, residuals).
_LAUNCH_S = 7e-6
_KERNELS_PER_LAYER = 45
# By how much computation slows under communication: 10% to 30% measured (Miao et al., Galvatron,
# arXiv:2211.13878); the lower end, for links that copy without the SMs' help.
_OVERLAP_SLOWDOWN = 0.1


def estimate_time(
    model: ModelSpec,
    workload: Workload,
    plan: Plan,
    hardware: HardwareSpec,
    calibration: Calibration | None = None,
    *,
    cold_start: ColdStart = NO_COLD_START,
) -> TimeEstimate:
    """Predict one optimizer step. The plan must be legal (`rules.check_plan`)."""
    table = estimate_time_table(
        model, workload, [plan], hardware, calibration, cold_start=cold_start
    )
    return table.estimate(0)


def estimate_time_table(
    model: ModelSpec,
    workload: Workload,
    plans: Sequence[Plan] | PlanColumns,
    hardware: HardwareSpec,
    calibration: Calibration | None = None,
    *,
    cold_start: ColdStart = NO_COLD_START,
) -> TimeTable:
    """Predict one optimizer step of each of many legal plans.

    Args:
        model: What is trained.
        workload: On what.
        plans: Any number of them.
        hardware: On which devices.
        calibration: What was measured of them; None predicts by formula alone.
        cold_start: What a run pays once, spread over its steps.
    """
    columns = plans if isinstance(plans, PlanColumns) else PlanColumns.of(plans)
    found = {name: np.zeros(len(columns)) for name in (*COMPONENTS, "hidden_communication_s")}
    for plan, index in layouts(columns):
        own = tensor_part(model, plan.tp)
        # What was measured of a machine is of whole models.
        known = calibration if plan.tp == 1 else None
        parts = _step(own, workload, plan, columns.numbers[index], hardware, known)
        for name, seconds in parts.items():
            found[name][index] = seconds
    found["overhead_s"] += cold_start.per_step_s
    tokens = workload.tokens_per_step
    return TimeTable(
        **found,
        num_ranks=columns.world_size,
        tokens_per_step=tokens,
        model_flops_per_step=model_flops_per_token(model, workload) * tokens,
        peak_flops=hardware.gpu.peak_flops[workload.precision],
    )


def _step(
    model: ModelSpec,
    workload: Workload,
    plan: Plan,
    numbers: Array,
    hardware: HardwareSpec,
    calibration: Calibration | None,
) -> dict[str, Array]:
    """Return the seconds of each part for plans that are like `plan` but for their numbers.

    Of a tensor-parallel plan `model` is the rank's part.
    """
    steps, recomputes = numbers[:, 1], plan.recompute is Recompute.FULL
    compute = compute_of(model, workload, plan, numbers, hardware, calibration)
    recompute = compute.recompute * recomputes
    traffic = traffic_of(
        model, workload, plan, numbers, Links(hardware=hardware, calibration=calibration)
    )
    # A CPU rank's cores also move the data, so nothing overlaps there.
    overlaps = not hardware.gpu.is_cpu
    hideable_forward = compute.forward * overlaps
    hideable_backward = (compute.backward + recompute) * overlaps
    micro_exposed = (
        _exposed(traffic.forward, hideable_forward, model.num_layers)
        + _exposed(traffic.backward, hideable_backward, model.num_layers)
        + traffic.blocking
    )
    # The reduction once a step runs under the last backward.
    once = _exposed(traffic.once_overlapped, hideable_backward, model.num_layers)
    exposed = steps * micro_exposed + once + traffic.once
    total = steps * (traffic.forward + traffic.backward + traffic.blocking)
    total += traffic.once_overlapped + traffic.once
    passes = steps * (compute.forward + compute.backward)
    recomputed = steps * recompute
    launches = _KERNELS_PER_LAYER * model.num_layers * _LAUNCH_S
    launches *= 4 if recomputes else 3  # backward starts about twice as many
    floor = np.maximum(0.0, steps * launches - passes - recomputed - exposed)
    optimizer, offload = optimizer_of(model, workload, plan, numbers, hardware, calibration)
    overhead = np.zeros(len(numbers))
    tried = exchange_tried(model, workload, plan, numbers, hardware, calibration)
    if tried is not None:
        exposed += steps * (tried - traffic.blocking)
        traffic = replace(traffic, blocking=tried)
    extra = engine_extra(model, workload, plan, numbers, hardware, calibration)
    if extra is not None:
        # The engine was tried: what the parts below say of it is scaled or filled up to that.
        exchange = steps * traffic.blocking
        said = exposed - exchange + optimizer + offload
        share = np.minimum(1.0, extra / np.maximum(said, 1e-12))
        exposed = exchange + share * (exposed - exchange)
        optimizer, offload = share * optimizer, share * offload
        overhead = np.maximum(0.0, extra - said)
    return {
        "compute_s": passes,
        "recompute_s": recomputed,
        "communication_s": exposed,
        "optimizer_s": optimizer,
        "offload_s": offload,
        "launch_s": floor * (not compute.measured),
        "overhead_s": overhead,
        "hidden_communication_s": np.maximum(0.0, total - exposed),
    }


def _exposed(communication: Array, compute: Array, num_units: int) -> Array:
    """What computation does not hide, and by how much the hidden part slows it.

    The first unit has nothing to hide under.
    """
    left = np.maximum(communication / num_units, communication - compute)
    return left + _OVERLAP_SLOWDOWN * np.minimum(communication, compute)
