"""Seconds of the optimizer step and of transfers between device and host."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from autotune.memory.activations import FP32, compute_bytes
from autotune.plan import Engine, Plan
from autotune.spec.hardware import HardwareSpec
from autotune.spec.model import ModelSpec
from autotune.spec.workload import OptimizerName, Workload
from autotune.timing.calibration import Calibration
from autotune.timing.compute import HBM_EFFICIENCY
from autotune.timing.links import LINK_EFFICIENCY

Array = NDArray[np.float64]

# Bytes moved per parameter: clip (read and write the gradient), then AdamW (read parameter,
# gradient, both moments; write parameter and both moments), all fp32.
ADAMW_BYTES = 9 * FP32
_SGD_BYTES = 5 * FP32
# Both moments are read and written in one byte each instead of four.
_ADAMW_8BIT_BYTES = 5 * FP32 + 4
_MOVED_BYTES: dict[OptimizerName, int] = {
    "adamw": ADAMW_BYTES,
    "sgd": _SGD_BYTES,
    "adamw_8bit": _ADAMW_8BIT_BYTES,
    "paged_adamw_8bit": _ADAMW_8BIT_BYTES,
}


def optimizer_of(
    model: ModelSpec,
    workload: Workload,
    plan: Plan,
    numbers: Array,
    hardware: HardwareSpec,
    calibration: Calibration | None,
) -> tuple[Array, Array]:
    """Return the seconds of the step and those of transfers, ``[plans]`` each."""
    steps, shards = numbers[:, 1], numbers[:, 3] * numbers[:, 4]
    if plan.engine is Engine.DDP:  # every rank steps over everything, sharing a sequence or not
        shards = np.ones(len(numbers))
    added = model.num_adapter_parameters(workload.adapter) if workload.adapter else 0
    total = model.num_parameters + added
    own = (added or total) / shards
    moved = own * _MOVED_BYTES[workload.optimizer]
    if not plan.offload_optimizer:
        if calibration is not None and workload.optimizer == "adamw":
            # DeepSpeed steps over one flat partition, the others over the model's tensors.
            flat = plan.engine is Engine.DEEPSPEED
            measured = calibration.optimizer_s(1 if flat else _tensors(model), own)
            if measured is not None:
                return measured, np.zeros(len(numbers))
        device = hardware.gpu.hbm_bytes_per_s * HBM_EFFICIENCY
        return moved / device, np.zeros(len(numbers))
    host = hardware.host_bytes_per_s / hardware.gpus_per_node * HBM_EFFICIENCY
    down = up = hardware.gpu.host_link.bytes_per_s * LINK_EFFICIENCY
    if calibration is not None:
        host = calibration.host_bytes_per_s or host
        down = calibration.to_host_bytes_per_s or down
        up = calibration.from_host_bytes_per_s or up
    width = compute_bytes(workload.precision)
    # Gradients go down in fp32 each synchronised micro-step, parameters come back once.
    downs = steps if plan.engine is Engine.DEEPSPEED else 1
    transfers = own * FP32 * downs / down + own * width / up
    if plan.offload_params:
        stored = FP32 if plan.engine is Engine.FSDP2 else width
        transfers = transfers + 2 * steps * stored * total / shards / up
    return moved / host, transfers


def _tensors(model: ModelSpec) -> int:
    """Return about how many parameters a model has: the matrices and norms of its layers."""
    matrices = sum(count for _, count in model.projections)
    return matrices + model.num_layers * model.norms_per_layer + 2
