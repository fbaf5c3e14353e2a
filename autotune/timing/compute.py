"""Seconds of forward, backward and recomputation of one micro-batch on one rank."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autotune.memory.activations import FP32, compute_bytes, count_activations, regime_of
from autotune.memory.columns import PlanColumns
from autotune.memory.knowledge import model_key
from autotune.plan import CpBackend, Engine, Plan
from autotune.spec.float8 import float8_counts
from autotune.spec.hardware import HardwareSpec
from autotune.spec.model import ModelSpec
from autotune.spec.workload import Precision, Workload
from autotune.timing.calibration import Calibration, has_measured_passes
from autotune.timing.flops import attention_flops_per_token

Array = NDArray[np.float64]

# Share of the peak that large matrix products reach, and of the memory bandwidth that streaming
# kernels reach: the defaults of roofline models (PyTorch's RuntimeEstimator uses 0.75).
_MATMUL_EFFICIENCY = 0.75
HBM_EFFICIENCY = 0.75
# FlashAttention-2 on H100 reaches 35% of the peak (Shah et al., arXiv:2407.08608). The masked path
# runs PyTorch's memory-efficient kernel: assumed half of that.
_FLASH_EFFICIENCY = 0.35
_MASKED_EFFICIENCY = 0.18
# Every saved byte is written in forward, and read and matched by a gradient of its size (written
# and read) in backward.
_TRAFFIC_FORWARD = 2
_TRAFFIC_BACKWARD = 4


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Compute:
    """Seconds of one micro-batch, ``[plans]``."""

    forward: Array
    backward: Array
    """Without recomputation."""
    recompute: Array
    """The layers' forward once more, where the plan asks for it."""
    measured: bool
    """From the real model's passes: kernel launches and casts are in them."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How fast a device multiplies and streams, measured where it was."""

    hardware: HardwareSpec
    precision: Precision
    calibration: Calibration | None = None

    def float8_s(self, rows: Any, inputs: float, outputs: float) -> Array:
        """Return the seconds of a product of 8-bit floats, casts of both operands included.

        Assumed, for want of any measurement: the share of the float8 peak is that of other
        products, and each operand is read twice in the compute type (its largest value, then the
        cast) and written once in float8, by streaming kernels. Eager torchao casts by way of fp32
        copies, which is more.
        """
        rows = np.asarray(rows, float)
        peak = self.hardware.gpu.fp8_flops
        if peak is None:  # emulated
            return self.matmul_s(rows, inputs, outputs)
        width = compute_bytes(self.precision)
        operands = rows * inputs + inputs * outputs
        casts = operands * (2 * width + 1) / self.stream_bytes_per_s
        moved = (operands + width * rows * outputs) / self.stream_bytes_per_s
        products = 2 * rows * inputs * outputs / (peak * _MATMUL_EFFICIENCY)
        return np.asarray(casts + np.maximum(products, moved), float)

    @cached_property
    def stream_bytes_per_s(self) -> float:
        """Bandwidth of streaming kernels."""
        if self.calibration and self.calibration.elementwise_bytes_per_s:
            return self.calibration.elementwise_bytes_per_s
        return self.hardware.gpu.hbm_bytes_per_s * HBM_EFFICIENCY

    def matmul_s(self, rows: Any, inputs: float, outputs: float, weights: Any = 1) -> Array:
        """Return the seconds of ``[rows, inputs] x [inputs, outputs]``.

        Args:
            rows: A number or an array.
            inputs: Features summed over.
            outputs: Features made.
            weights: How many matrices of that shape are read, where rows go to several.
        """
        rows = np.asarray(rows, float)
        flops = 2 * rows * inputs * outputs
        if self.calibration is not None:
            rate = self.calibration.matmul_flops_per_s(self.precision, rows, inputs, outputs)
            if rate is not None:
                return np.asarray(flops / rate, float)
        width = compute_bytes(self.precision)
        moved = width * (weights * inputs * outputs + rows * (inputs + outputs))
        peak = self.hardware.gpu.peak_flops[self.precision] * _MATMUL_EFFICIENCY
        return np.asarray(np.maximum(flops / peak, moved / self.stream_bytes_per_s), float)


def compute_of(
    model: ModelSpec,
    workload: Workload,
    plan: Plan,
    numbers: Array,
    hardware: HardwareSpec,
    calibration: Calibration | None,
) -> Compute:
    """Return the passes of plans that are like `plan` but for their numbers."""
    batch, cp = numbers[:, 0], numbers[:, 4]
    tokens = batch * workload.seq_len / cp
    regime = regime_of(plan, workload.precision)
    if calibration is not None and has_measured_passes(workload):
        passes = calibration.passes(model_key(model), regime, packing=workload.packing)
        if passes is not None and passes.layer_recompute is not None:
            depth, seq = model.num_layers, workload.seq_len
            return Compute(
                forward=depth * passes.layer_forward.seconds(tokens, seq)
                + passes.fixed_forward.seconds(tokens, seq),
                backward=depth * passes.layer_backward.seconds(tokens, seq)
                + passes.fixed_backward.seconds(tokens, seq),
                recompute=depth * passes.layer_recompute.seconds(tokens, seq),
                measured=True,
            )
    rates = Rates(hardware=hardware, precision=workload.precision, calibration=calibration)
    return _roofline(model, workload, plan, batch, cp, rates)


def _roofline(
    model: ModelSpec, workload: Workload, plan: Plan, batch: Array, cp: Array, rates: Rates
) -> Compute:
    tokens = batch * workload.seq_len / cp
    layers_forward = np.zeros_like(tokens)
    in_float8 = dict(float8_counts(model)) if workload.fp8 else {}
    for place, (shape, count) in enumerate(model.projections):
        eight_bit = in_float8.get(place, 0)
        layers_forward += (count - eight_bit) * rates.matmul_s(tokens, *shape)
        if eight_bit:
            layers_forward += eight_bit * rates.float8_s(tokens, *shape)
    if model.moe:
        # Each token goes to several experts; those that get one are read whole.
        h, ffn = model.hidden_size, model.moe.expert_ffn_size
        assigned = model.moe.experts_per_token * tokens
        read = np.minimum(model.moe.num_experts, assigned)
        experts = rates.matmul_s(assigned, h, 2 * ffn, read) + rates.matmul_s(
            assigned, ffn, h, read
        )
        layers_forward += model.num_moe_layers * (
            experts + rates.matmul_s(tokens, h, model.moe.num_experts)
        )
    projections = layers_forward
    head = rates.matmul_s(tokens, model.hidden_size, model.vocab_size)
    adapters = np.zeros_like(tokens)
    if workload.adapter is not None:
        rank = workload.adapter.r
        shapes = [s for name, s in model.linears.items() if name in workload.adapter.target_modules]
        for inputs, outputs in shapes:
            adapters += rates.matmul_s(tokens, inputs, rank) + rates.matmul_s(tokens, rank, outputs)
        adapters *= model.num_layers
    attention = tokens * _attention_s_per_token(model, workload, plan, rates)
    if plan.cp_backend is CpBackend.RING and not workload.packing:
        # Contiguous parts: the last rank attends to all blocks, the mean one to half of them.
        attention = attention * (2 - 1 / cp)
    layers_saved, logits = _activation_bytes(model, workload, plan, batch, cp)
    layer_traffic = layers_saved / rates.stream_bytes_per_s
    logits_traffic = logits / rates.stream_bytes_per_s
    layers = projections + adapters + attention + _TRAFFIC_FORWARD * layer_traffic
    forward = layers + head + _TRAFFIC_FORWARD * logits_traffic
    weight_gradients = 1 if workload.adapter is None else 0
    backward = (
        (1 + weight_gradients) * (projections + head)
        + 2 * (adapters + attention)
        + _TRAFFIC_BACKWARD * (layer_traffic + logits_traffic)
    )
    if workload.precision is Precision.BF16 and plan.engine is Engine.DDP:
        # Autocast casts every weight once in forward and its gradient once in backward.
        weights = model.num_layer_matmul_parameters + model.num_embedding_parameters
        cast = weights * (FP32 + compute_bytes(workload.precision)) / rates.stream_bytes_per_s
        forward, backward = forward + cast, backward + cast
    return Compute(forward=forward, backward=backward, recompute=layers, measured=False)


def _attention_s_per_token(model: ModelSpec, workload: Workload, plan: Plan, rates: Rates) -> float:
    ulysses = plan.cp_backend is CpBackend.ULYSSES
    causal, masked = attention_flops_per_token(model, workload, documents_masked=ulysses)
    peak = rates.hardware.gpu.peak_flops[workload.precision]
    return causal / (peak * _FLASH_EFFICIENCY) + masked / (peak * _MASKED_EFFICIENCY)


def _activation_bytes(
    model: ModelSpec, workload: Workload, plan: Plan, batch: Array, cp: Array
) -> tuple[Array, Array]:
    """Return the saved bytes of all layers, and the loss's; both are linear in the micro-batch."""
    layers, logits = np.zeros_like(batch), np.zeros_like(batch)
    for degree in sorted(set(cp.tolist())):
        one, two = (
            count_activations(model, workload, replace(plan, micro_batch_size=size, cp=int(degree)))
            for size in (1, 2)
        )
        at = cp == degree
        more = batch[at] - 1
        layers[at] = one.layers + more * (two.layers - one.layers)
        # Each tensor-parallel rank takes the loss over the whole vocabulary.
        logits[at] = plan.tp * (one.logits_loss + more * (two.logits_loss - one.logits_loss))
    return layers, logits


def layouts(columns: PlanColumns) -> Any:
    """Yield a plan of each layout and the index of all its plans."""
    order = np.argsort(columns.layout, kind="stable")
    cuts = np.flatnonzero(np.diff(columns.layout[order])) + 1
    for index in np.split(order, cuts) if len(order) else ():
        yield columns.plan(int(index[0])), index
