"""`estimate_time`: roofline and links, for one optimizer step.

Formulas and sources: docs/formulas.md. The efficiencies below are assumptions that rank plans until
measured trials correct them; no figure here was fitted to this project's runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from autotune.memory.activations import FP32, compute_bytes, count_activations
from autotune.plan import Engine, Plan, Recompute
from autotune.spec.hardware import HardwareSpec
from autotune.spec.model import ModelSpec
from autotune.spec.workload import Precision, Workload

# Share of the peak that large matrix products reach, and of the memory bandwidth that streaming
# kernels reach: the defaults of roofline models (PyTorch's RuntimeEstimator uses 0.75).
_MATMUL_EFFICIENCY = 0.75
_HBM_EFFICIENCY = 0.75
# FlashAttention-2 on H100 reaches 35% of the peak (Shah et al., arXiv:2407.08608). The masked path
# runs PyTorch's memory-efficient kernel: assumed half of that.
_FLASH_EFFICIENCY = 0.35
_MASKED_EFFICIENCY = 0.18
# Share of a link's nominal rate that large collectives reach (nccl-tests on NVLink nodes).
_LINK_EFFICIENCY = 0.75
# Starting one eager PyTorch kernel from Python, and how many a layer's forward starts in
# transformers (norms, rotary embedding, projections, attention, SwiGLU, residuals).
_LAUNCH_S = 7e-6
_KERNELS_PER_LAYER = 45
# Every saved byte is written in forward, and read and matched by a gradient of its size (written
# and read) in backward.
_TRAFFIC_FORWARD = 2
_TRAFFIC_BACKWARD = 4
# Bytes moved per parameter: clip (read and write the gradient), then AdamW (read parameter,
# gradient, both moments; write parameter and both moments), all fp32.
_ADAMW_BYTES = 9 * FP32
_SGD_BYTES = 5 * FP32
# Base latency of an NCCL ring with the Simple protocol (src/graph/tuning.cc).
_COLLECTIVE_BASE_S = 8.4e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeEstimate:
    """Predicted seconds of one optimizer step, by what the slowest rank waits for."""

    compute_s: float
    """Forward and backward, without recomputation."""
    recompute_s: float
    communication_s: float
    """Communication that computation does not hide."""
    optimizer_s: float
    """Clipping and optimizer step, on the device or on the host."""
    offload_s: float
    """Transfers between device and host that computation does not hide."""
    launch_s: float
    """What starting kernels adds where the device waits for the host."""
    hidden_communication_s: float
    """Communication under computation; not part of the step."""
    tokens_per_step: int
    num_ranks: int
    model_flops_per_step: float
    """Useful FLOPs of all ranks: no recomputation."""
    peak_flops: float
    """Of one rank."""

    @property
    def step_s(self) -> float:
        """Seconds of one optimizer step."""
        return sum(self.components.values())

    @property
    def components(self) -> dict[str, float]:
        """The parts `step_s` is the sum of."""
        return {
            "compute_s": self.compute_s,
            "recompute_s": self.recompute_s,
            "communication_s": self.communication_s,
            "optimizer_s": self.optimizer_s,
            "offload_s": self.offload_s,
            "launch_s": self.launch_s,
        }

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all ranks a second."""
        return self.tokens_per_step / self.step_s

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation (Chowdhery et al., PaLM, arXiv:2204.02311, appendix B)."""
        return self.model_flops_per_step / (self.step_s * self.peak_flops * self.num_ranks)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "step_s": self.step_s,
            "tokens_per_s": self.tokens_per_s,
            "tokens_per_s_per_gpu": self.tokens_per_s / self.num_ranks,
            "mfu": self.mfu,
            "components": self.components,
        }


def estimate_time(
    model: ModelSpec, workload: Workload, plan: Plan, hardware: HardwareSpec
) -> TimeEstimate:
    """Predict one optimizer step. The plan must be legal (`rules.check_plan`)."""
    micro_steps = plan.grad_accum_steps
    forward, backward, layers_forward = _compute(model, workload, plan, hardware)
    recompute = layers_forward if plan.recompute is Recompute.FULL else 0.0
    traffic = _communication(model, workload, plan, hardware)
    # A CPU rank's cores also move the data, so nothing overlaps there.
    overlaps = not hardware.gpu.is_cpu
    hideable_forward = forward * overlaps
    hideable_backward = (backward + recompute) * overlaps
    micro_exposed = (
        _exposed(traffic.forward, hideable_forward, model.num_layers)
        + _exposed(traffic.backward, hideable_backward, model.num_layers)
        + traffic.blocking
    )
    # The reduction once a step runs under the last backward.
    once = _exposed(traffic.once_overlapped, hideable_backward, model.num_layers)
    exposed = micro_steps * micro_exposed + once + traffic.once
    total = micro_steps * (traffic.forward + traffic.backward + traffic.blocking)
    total += traffic.once_overlapped + traffic.once
    compute = micro_steps * (forward + backward)
    recomputed = micro_steps * recompute
    launches = _KERNELS_PER_LAYER * model.num_layers * _LAUNCH_S
    launches *= 4 if plan.recompute is Recompute.FULL else 3  # backward starts about twice as many
    floor = max(0.0, micro_steps * launches - compute - recomputed - exposed)
    optimizer, offload = _optimizer(model, workload, plan, hardware)
    return TimeEstimate(
        compute_s=compute,
        recompute_s=recomputed,
        communication_s=exposed,
        optimizer_s=optimizer,
        offload_s=offload,
        launch_s=floor,
        hidden_communication_s=max(0.0, total - exposed),
        tokens_per_step=workload.tokens_per_step,
        num_ranks=plan.world_size,
        model_flops_per_step=_model_flops_per_token(model, workload) * workload.tokens_per_step,
        peak_flops=hardware.gpu.peak_flops[workload.precision],
    )


def _causal_attention_flops_per_token(model: ModelSpec, workload: Workload) -> float:
    """Useful forward FLOPs of scores and values, all layers: what causality and windows leave."""
    length = workload.seq_len
    windowed = model.num_window_layers_at(length)
    seen = (model.num_layers - windowed) * length / 2
    if windowed and (window := model.sliding_window):
        # The first tokens of a sequence have fewer before them than the window holds.
        seen += windowed * window * (1 - window / (2 * length))
    return 4 * model.query_size * seen


def _attention_s_per_token(model: ModelSpec, workload: Workload, peak_flops: float) -> float:
    """Seconds of the forward kernels, all layers; a masked one computes what the mask hides."""
    per_layer = 4 * workload.seq_len * model.query_size
    windowed = model.num_window_layers_at(workload.seq_len)
    masked = model.num_layers if workload.packing else windowed
    flash = (model.num_layers - masked) * per_layer / 2 / (peak_flops * _FLASH_EFFICIENCY)
    return flash + masked * per_layer / (peak_flops * _MASKED_EFFICIENCY)


def _model_flops_per_token(model: ModelSpec, workload: Workload) -> float:
    """Useful FLOPs: forward 2 a weight, backward as much again for inputs and for weights.

    LoRA's backward has no weight gradients of the frozen base.
    """
    attention = _causal_attention_flops_per_token(model, workload)
    passes = 3 if workload.adapter is None else 2
    flops = passes * 2 * model.num_matmul_parameters + 3 * attention
    if workload.adapter is not None:
        flops += 3 * 2 * model.num_adapter_parameters(workload.adapter)
    return flops


def _compute(
    model: ModelSpec, workload: Workload, plan: Plan, hardware: HardwareSpec
) -> tuple[float, float, float]:
    """Return the forward, the backward, and the layers' part of the forward, in seconds."""
    gpu = hardware.gpu
    peak = gpu.peak_flops[workload.precision]
    bandwidth = gpu.hbm_bytes_per_s * _HBM_EFFICIENCY
    tokens = plan.micro_batch_size * workload.seq_len / plan.cp
    width = compute_bytes(workload.precision)

    def matmul(inputs: int, outputs: int, rows: float = tokens, weights: float = 1) -> float:
        flops = 2 * rows * inputs * outputs / (peak * _MATMUL_EFFICIENCY)
        moved = width * (weights * inputs * outputs + rows * (inputs + outputs)) / bandwidth
        return max(flops, moved)

    projections = sum(count * matmul(*shape) for shape, count in model.projections)
    if model.moe:
        # Each token goes to several experts; those that get one are read whole.
        h, ffn = model.hidden_size, model.moe.expert_ffn_size
        assigned = model.moe.experts_per_token * tokens
        read = min(model.moe.num_experts, assigned)
        experts = matmul(h, 2 * ffn, assigned, read) + matmul(ffn, h, assigned, read)
        projections += model.num_moe_layers * (experts + matmul(h, model.moe.num_experts))
    head = matmul(model.hidden_size, model.vocab_size)
    adapters = 0.0
    if workload.adapter is not None:
        rank = workload.adapter.r
        shapes = [s for name, s in model.linears.items() if name in workload.adapter.target_modules]
        adapters = sum(matmul(i, rank) + matmul(rank, o) for i, o in shapes) * model.num_layers
    attention = tokens * _attention_s_per_token(model, workload, peak)
    activations = count_activations(model, workload, plan)
    layer_traffic = activations.layers / bandwidth
    logits_traffic = activations.logits_loss / bandwidth
    layers = projections + adapters + attention + _TRAFFIC_FORWARD * layer_traffic
    forward = layers + head + _TRAFFIC_FORWARD * logits_traffic
    weight_gradients = 1 if workload.adapter is None else 0
    backward = (
        (1 + weight_gradients) * (projections + head)
        + 2 * (adapters + attention)
        + _TRAFFIC_BACKWARD * layer_traffic
        + _TRAFFIC_BACKWARD * logits_traffic
    )
    if workload.precision is Precision.BF16 and plan.engine is Engine.DDP:
        # Autocast casts every weight once in forward and its gradient once in backward.
        weights = model.num_layer_matmul_parameters + model.num_embedding_parameters
        cast = weights * (FP32 + width) / bandwidth
        forward, backward = forward + cast, backward + cast
    return forward, backward, layers


@dataclass(frozen=True, kw_only=True, slots=True)
class _Traffic:
    """Seconds of communication, and what it may hide under."""

    forward: float = 0.0
    """Each micro-step, under forward."""
    backward: float = 0.0
    """Each micro-step, under backward."""
    blocking: float = 0.0
    """Each micro-step, nothing to hide under."""
    once_overlapped: float = 0.0
    """Once a step, under the last backward."""
    once: float = 0.0
    """Once a step, nothing to hide under."""


def _communication(
    model: ModelSpec, workload: Workload, plan: Plan, hardware: HardwareSpec
) -> _Traffic:
    width = compute_bytes(workload.precision)
    added = model.num_adapter_parameters(workload.adapter) if workload.adapter else 0
    total = model.num_parameters + added
    trainable = added or total
    layers = model.num_layers
    shards = plan.shard_size

    def gather(num_bytes: float, calls: int) -> float:
        return collective_s(num_bytes, shards, 1, hardware, calls)

    blocking = _sequence_exchange(model, workload, plan, hardware)
    match plan.engine:
        case Engine.DDP:
            group = plan.dp_replicate * plan.cp
            reduce = 2 * collective_s(FP32 * trainable, group, 1, hardware, layers)
            return _Traffic(blocking=blocking, once_overlapped=reduce)
        case Engine.DEEPSPEED if plan.zero_stage == 1:
            # Reduced at the accumulation boundary, after backward.
            reduce = gather(FP32 * trainable, layers)
            return _Traffic(blocking=blocking, once=reduce + gather(width * trainable, layers))
        case Engine.DEEPSPEED if plan.zero_stage == 2:
            # Every micro-step reduces into the owner's partition.
            return _Traffic(
                blocking=blocking,
                backward=gather(FP32 * trainable, layers),
                once=gather(width * trainable, layers),
            )
        case Engine.DEEPSPEED:
            parameters = gather(width * total, layers)
            return _Traffic(
                blocking=blocking,
                forward=parameters,
                backward=parameters + gather(FP32 * trainable, layers),
            )
        case Engine.FSDP2:
            parameters = gather(width * total, layers)
            once = gather(FP32 * trainable, layers)
            if plan.dp_replicate > 1:
                shard = FP32 * trainable / shards
                once += 2 * collective_s(shard, plan.dp_replicate, shards, hardware, layers)
            return _Traffic(
                blocking=blocking,
                forward=parameters,
                backward=parameters if plan.reshard_after_forward else 0.0,
                once_overlapped=once,
            )


def collective_s(
    num_bytes: float, ranks: int, stride: int, hardware: HardwareSpec, calls: int
) -> float:
    """Seconds of ring all-gathers or reduce-scatters that move `num_bytes` in `calls` parts.

    ``alpha + S * (n - 1) / (n * bandwidth)`` for each. A ring over nodes enters a node once for
    each of its members there, so it has that many network cards.

    Args:
        num_bytes: Size of the whole (unsharded) data.
        ranks: Group size.
        stride: Distance between neighbouring ranks of the group.
        hardware: Links and nodes.
        calls: Number of collectives the data is split over.
    """
    if ranks == 1:
        return 0.0
    per_node = max(1, min(ranks, hardware.gpus_per_node // stride))
    nodes = math.ceil(ranks / per_node)
    bandwidth = hardware.intra_node.bytes_per_s
    hops = (ranks - nodes) * hardware.intra_node.alpha_s
    if nodes > 1:
        bandwidth = min(bandwidth, hardware.inter_node.bytes_per_s * per_node)
        hops += (nodes - 1) * hardware.inter_node.alpha_s
    moved = num_bytes * (ranks - 1) / ranks
    return calls * (_COLLECTIVE_BASE_S + hops) + moved / (bandwidth * _LINK_EFFICIENCY)


def _sequence_exchange(
    model: ModelSpec, workload: Workload, plan: Plan, hardware: HardwareSpec
) -> float:
    """Ulysses: all-to-all of q, k, v before attention and of its output after, in each pass."""
    if plan.cp == 1:
        return 0.0
    tokens = plan.micro_batch_size * workload.seq_len / plan.cp
    width = compute_bytes(workload.precision)
    elements = tokens * (2 * model.query_size + 2 * model.kv_size)
    passes = 3 if plan.recompute is Recompute.FULL else 2
    # collective_s counts the (n - 1) / n that leaves a rank.
    one_layer = collective_s(width * elements, plan.cp, 1, hardware, 4)
    return passes * model.num_layers * one_layer


def _exposed(communication: float, compute: float, num_units: int) -> float:
    """What computation does not hide: the first unit has nothing to hide under."""
    return max(communication / num_units, communication - compute)


def _optimizer(
    model: ModelSpec, workload: Workload, plan: Plan, hardware: HardwareSpec
) -> tuple[float, float]:
    """Return the seconds of the optimizer step and of transfers to and from the host."""
    added = model.num_adapter_parameters(workload.adapter) if workload.adapter else 0
    total = model.num_parameters + added
    own = (added or total) / plan.shard_size
    moved = own * (_ADAMW_BYTES if workload.optimizer == "adamw" else _SGD_BYTES)
    if not plan.offload_optimizer:
        return moved / (hardware.gpu.hbm_bytes_per_s * _HBM_EFFICIENCY), 0.0
    host = hardware.host_bytes_per_s / hardware.gpus_per_node * _HBM_EFFICIENCY
    link = hardware.gpu.host_link.bytes_per_s * _LINK_EFFICIENCY
    width = compute_bytes(workload.precision)
    # Gradients go down in fp32 each synchronised micro-step, parameters come back once.
    downs = plan.grad_accum_steps if plan.engine is Engine.DEEPSPEED else 1
    transfers = own * (FP32 * downs + width)
    if plan.offload_params:
        gathers = 2 * plan.grad_accum_steps
        stored = FP32 if plan.engine is Engine.FSDP2 else width
        transfers += gathers * stored * total / plan.shard_size
    return moved / host, transfers / link
