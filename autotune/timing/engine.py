"""What a tried engine takes beyond the model's passes, for plans it was not tried with."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from autotune.memory.activations import regime_of
from autotune.memory.knowledge import model_key
from autotune.plan import CpBackend, Engine, Plan, Recompute
from autotune.spec.hardware import HardwareSpec
from autotune.spec.model import ModelSpec
from autotune.spec.workload import Workload
from autotune.timing.calibration import (
    EXCHANGED,
    TRIED_CP,
    Calibration,
    engine_kind,
    has_measured_passes,
)
from autotune.timing.passes import nonnegative_fit

Array = NDArray[np.float64]


def engine_extra(
    model: ModelSpec,
    workload: Workload,
    plan: Plan,
    numbers: Array,
    hardware: HardwareSpec,
    calibration: Calibration | None,
) -> Array | None:
    """Return the seconds a step of an engine takes beyond the passes, ``[plans]``.

    A step of ``m`` micro-steps is ``m (passes + a) + b``: reductions, gathers, copies, hooks and
    the Trainer's loop are in ``a`` and ``b``, the optimizer in ``b``. None of it grows with the
    tokens, so one small micro-batch at accumulation 1 and 2 tells both. That holds where nothing
    overlaps: on CPU ranks. A model deeper than what was tried scales by its parameters.

    Returns:
        None where the engine was not tried on so many ranks.
    """
    if calibration is None or not (hardware.gpu.is_cpu and has_measured_passes(workload)):
        return None
    key = model_key(model)
    times = calibration.engine(key, workload, engine_kind(plan), plan.world_size)
    regime = regime_of(plan, workload.precision)
    passes = calibration.passes(key, regime, packing=workload.packing)
    if times is None or passes is None:
        return None
    point = max(times.points, key=lambda p: p.layers)
    tokens = point.micro_batch_size * point.seq_len
    expected = passes.seconds(point.layers, tokens, point.seq_len)
    deeper = _parameters(model, model.num_layers) / _parameters(model, point.layers)
    each = max(0.0, point.step_twice_s - point.step_s - expected) * deeper
    once = max(0.0, 2 * point.step_s - point.step_twice_s) * deeper
    return np.asarray(numbers[:, 1] * each + once, float)


def exchange_tried(
    model: ModelSpec,
    workload: Workload,
    plan: Plan,
    numbers: Array,
    hardware: HardwareSpec,
    calibration: Calibration | None,
) -> Array | None:
    """Return the seconds sequence parallelism adds to a micro-step, ``[plans]``, as it was tried.

    What DDP over halved sequences took beyond its passes and beyond what DDP takes anyway, as an
    amount a micro-step and an amount a token: the exchanges, and what whole-sequence attention
    costs besides, such as its mask. Recomputation does the forward half again.

    Returns:
        None where no plan is sequence-parallel, or none was tried on so many ranks; what was
        tried is Ulysses.
    """
    if calibration is None or not (hardware.gpu.is_cpu and has_measured_passes(workload)):
        return None
    if plan.cp_backend is not CpBackend.ULYSSES:
        return None
    key, cp = model_key(model), numbers[:, 4]
    ddp = Plan(strategy="ddp", engine=Engine.DDP)
    passes = calibration.passes(key, regime_of(ddp, workload.precision), packing=workload.packing)
    alone = calibration.engine(key, workload, engine_kind(ddp), plan.world_size)
    tried = calibration.engine(key, workload, engine_kind(ddp) + EXCHANGED, plan.world_size)
    if (cp == 1).all() or passes is None or alone is None or tried is None:
        return None
    known = []
    for point in tried.points:
        tokens = point.micro_batch_size * point.seq_len / TRIED_CP
        own = passes.seconds(point.layers, tokens, point.seq_len)
        known.append((tokens, point.step_twice_s - point.step_s - own, point.layers))
    base = max(alone.points, key=lambda p: p.layers)
    tokens = base.micro_batch_size * base.seq_len
    hooks = base.step_twice_s - base.step_s - passes.seconds(base.layers, tokens, base.seq_len)
    sizes = np.array([[layers, layers * tokens] for tokens, _, layers in known], float)
    least = 1e-6  # the fit is of relative errors
    seconds = np.array([max(least, each - max(0.0, hooks)) for _, each, _ in known])
    each_layer, each_token = nonnegative_fit(sizes, seconds)
    per_layer = each_layer + each_token * numbers[:, 0] * workload.seq_len / cp
    repeats = 1.5 if plan.recompute is Recompute.FULL else 1.0
    return np.where(cp > 1, repeats * model.num_layers * per_layer, 0.0)


def _parameters(model: ModelSpec, layers: int) -> float:
    outside = model.num_root_parameters
    return outside + layers * (model.num_parameters - outside) / model.num_layers
