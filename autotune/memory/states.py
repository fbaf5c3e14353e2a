"""Model states, gathered parameters and gradient buffers of each engine.

Sources: Rajbhandari et al., "ZeRO", arXiv:1910.02054; DeepSpeed 0.19 runtime/zero/stage_1_and_2.py
and stage3.py; PyTorch 2.13 torch/distributed/fsdp/_fully_shard and torch/nn/parallel. All under
one numerics contract: fp32 master weights, fp32 gradient reduction and accumulation.
"""

from __future__ import annotations

from dataclasses import dataclass

from autotune.memory.activations import FP32, Regime, compute_bytes, regime_of
from autotune.plan import Engine, Plan, Recompute
from autotune.spec.hardware import HardwareSpec
from autotune.spec.model import ModelSpec
from autotune.spec.workload import Workload

# DeepSpeed's default of stage3_max_reuse_distance: parameters needed again within so many elements
# stay gathered. Around the turn from forward to backward that is half of it on either side.
_ZERO3_REUSE_ELEMENTS = 1_000_000_000
# DeepSpeed's default sub_group_size: ZeRO-3 steps the optimizer over so many elements at a time.
_ZERO3_SUB_GROUP_ELEMENTS = 1_000_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelStates:
    """Bytes on one rank."""

    parameters: int
    optimizer: int
    """Optimizer states and, where the engine keeps one apart, the fp32 master copy."""
    gradients_first: int
    """Gradients held while the first micro-step runs forward."""
    gradients_later: int
    """Gradients held while a later micro-step runs."""
    gradients_step: int
    """Gradients held when the optimizer steps."""
    cast_cache: int
    """Weights cast to the compute type that backward needs again (autocast)."""
    gathered_forward: int
    """Unsharded parameters alive at the end of forward."""
    gathered_backward: int
    """Unsharded parameters alive inside a layer's backward."""
    gathered_end: int
    """Unsharded parameters alive at the end of backward."""
    buckets: int
    """Communication buffers that live as long as the run."""
    head_gradient_work: int
    """Temporary gradients while the output head's backward runs."""
    layer_gradient_work: int
    """Temporary gradients while a layer's backward runs."""
    end_gradient_work: int
    """Temporary gradients while the last unit is reduced."""
    step_work: int
    """Temporaries of the optimizer step."""
    host: int
    """Moved to host memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sizes:
    """Element counts the formulas share."""

    total: int
    trainable: int
    layer: int
    layer_trainable: int
    root: int
    root_trainable: int
    head: int
    head_trainable: int
    largest_module: int
    largest_trainable: int
    shards: int
    width: int
    adam: int
    """Bytes of optimizer state per trainable element, master copy left out."""

    def per_shard(self, num_bytes: int) -> int:
        return -(-num_bytes // self.shards)


def model_states(
    model: ModelSpec, workload: Workload, plan: Plan, hardware: HardwareSpec
) -> ModelStates:
    """Compose the states of the plan's engine."""
    sizes = _sizes(model, workload, plan)
    match plan.engine:
        case Engine.DDP:
            return _ddp(sizes, model, workload, plan, hardware)
        case Engine.DEEPSPEED if plan.zero_stage == 3:
            return _zero3(sizes, model, plan)
        case Engine.DEEPSPEED:
            return _zero12(sizes, model, plan, hardware)
        case Engine.FSDP2:
            return _fsdp2(sizes, plan, hardware)


def _sizes(model: ModelSpec, workload: Workload, plan: Plan) -> _Sizes:
    adapter = workload.adapter
    added = model.num_adapter_parameters(adapter) if adapter else 0
    added_layer = added // model.num_layers
    total = model.num_parameters + added
    head = model.num_embedding_parameters
    if adapter:
        widths = [max(shape) for n, shape in model.linears.items() if n in adapter.target_modules]
        largest_trainable = adapter.r * max(widths, default=0)
    else:
        largest_trainable = model.largest_parameter
    return _Sizes(
        total=total,
        trainable=added if adapter else total,
        layer=model.num_parameters_per_layer + added_layer,
        layer_trainable=added_layer if adapter else model.num_parameters_per_layer,
        root=model.num_root_parameters,
        root_trainable=0 if adapter else model.num_root_parameters,
        head=head,
        head_trainable=0 if adapter else head,
        largest_module=model.largest_module,
        largest_trainable=largest_trainable,
        shards=plan.shard_size,
        width=compute_bytes(workload.precision),
        adam=2 * FP32 if workload.optimizer == "adamw" else 0,
    )


def _ddp(
    s: _Sizes, model: ModelSpec, workload: Workload, plan: Plan, hardware: HardwareSpec
) -> ModelStates:
    autocast = regime_of(plan, workload.precision) is Regime.AUTOCAST
    gradients = FP32 * s.trainable
    # Recompute drops a layer's casts with its activations; only the one at work has them.
    added = s.layer_trainable * (s.trainable != s.total)
    if plan.recompute is Recompute.NONE:
        matrices = model.num_layer_matmul_parameters + model.num_layers * added
    else:
        matrices = model.largest_layer_matmul_parameters + added
    cast = s.width * (matrices + s.head)
    return ModelStates(
        parameters=FP32 * s.total,
        optimizer=s.adam * s.trainable,
        gradients_first=0,
        gradients_later=gradients,
        gradients_step=gradients,
        cast_cache=cast if autocast else 0,
        gathered_forward=0,
        gathered_backward=0,
        gathered_end=0,
        # The reducer copies gradients into buckets of their own (gradient_as_bucket_view=False,
        # the default); a single process is not wrapped.
        buckets=gradients if plan.world_size > 1 else 0,
        # Autocast computes a bf16 gradient and casts it to the fp32 one.
        head_gradient_work=(s.width * autocast + FP32) * s.head_trainable,
        layer_gradient_work=(s.width * autocast + FP32) * s.layer_trainable,
        end_gradient_work=s.width * autocast * s.head_trainable,
        step_work=_native_step_work(s, hardware),
        host=0,
    )


def _zero12(s: _Sizes, model: ModelSpec, plan: Plan, hardware: HardwareSpec) -> ModelStates:
    bucket = _bucket_elements(model, plan)
    shard = s.per_shard(FP32 * s.trainable)
    # Stage 1 accumulates whole fp32 gradients (param.grad_accum), stage 2 its own partition.
    kept = FP32 * s.trainable if plan.zero_stage == 1 else shard
    states = s.per_shard((FP32 + s.adam) * s.trainable)
    # A parameter above the bucket size is reduced alone: its gradient and an fp32 copy.
    large = (s.width + FP32) * s.largest_trainable
    offload = plan.offload_optimizer
    return ModelStates(
        parameters=s.width * s.total,
        optimizer=0 if offload else states,
        gradients_first=0,
        gradients_later=0 if offload else kept,
        gradients_step=0 if offload else kept,
        cast_cache=0,
        gathered_forward=0,
        gathered_backward=0,
        gathered_end=0,
        # overlap_comm, which needs a CUDA stream, fills one while the other is reduced.
        buckets=FP32 * bucket * (1 if hardware.gpu.is_cpu else 2),
        head_gradient_work=(s.width + FP32) * s.head_trainable,
        layer_gradient_work=max(s.width * min(s.layer_trainable, bucket), large),
        end_gradient_work=(s.width + FP32) * s.head_trainable,
        # The partition's gradient is flattened into a copy; Adam takes one more for its divisor.
        step_work=0 if offload else 2 * shard,
        # Pinned: master, Adam, gradients; and an accumulation buffer with several micro-steps.
        host=states + shard * (2 if plan.grad_accum_steps > 1 else 1) if offload else 0,
    )


def _zero3(s: _Sizes, model: ModelSpec, plan: Plan) -> ModelStates:
    bucket = _bucket_elements(model, plan)
    gradients = s.per_shard(FP32 * s.trainable)
    states = s.per_shard((FP32 + s.adam) * s.trainable)
    parameters = s.per_shard(s.width * s.total)
    # The largest module, what is prefetched, and what the reuse distance keeps around the turn.
    live = s.largest_module + bucket + _ZERO3_REUSE_ELEMENTS // 2
    gathered = s.width * min(s.total, live)
    large = (s.width + FP32) * s.largest_trainable
    offload = plan.offload_optimizer
    sub_group = min(s.per_shard(s.trainable), _ZERO3_SUB_GROUP_ELEMENTS)
    return ModelStates(
        parameters=0 if plan.offload_params else parameters,
        optimizer=0 if offload else states,
        # One flat buffer, allocated at start.
        gradients_first=0 if offload else gradients,
        gradients_later=0 if offload else gradients,
        gradients_step=0 if offload else gradients,
        cast_cache=0,
        gathered_forward=gathered,
        gathered_backward=gathered,
        gathered_end=gathered,
        buckets=FP32 * bucket,
        head_gradient_work=(s.width + FP32) * s.head_trainable,
        layer_gradient_work=max(s.width * min(s.layer_trainable, bucket), large),
        end_gradient_work=(s.width + FP32) * s.head_trainable,
        step_work=0 if offload else 2 * FP32 * sub_group,
        host=(parameters if plan.offload_params else 0)
        + (states + gradients * (2 if plan.grad_accum_steps > 1 else 1) if offload else 0),
    )


def _fsdp2(s: _Sizes, plan: Plan, hardware: HardwareSpec) -> ModelStates:
    parameters = s.per_shard(FP32 * s.total)
    gradients = s.per_shard(FP32 * s.trainable)
    optimizer = s.per_shard(s.adam * s.trainable)
    # Gathered units are in the compute type. Implicit prefetch holds the next unit's all-gather
    # output beside the copied-out parameters, so two layers; embedding, head and final norm are the
    # root unit, which stays from forward to the end of backward.
    units = 2 * s.layer + s.root
    forward = units if plan.reshard_after_forward else s.total + s.layer
    # Micro-steps before the last do not synchronise: whole gradients in the reduce type.
    unsynced = FP32 * s.trainable if plan.grad_accum_steps > 1 else 0
    # A unit's gradients, and the reduce-scatter input of the unit before it.
    layer_work = (s.width + FP32) * s.layer_trainable
    root_gradients = s.width * s.root_trainable
    offload = plan.offload_params
    return ModelStates(
        parameters=0 if offload else parameters,
        optimizer=0 if offload else optimizer,
        gradients_first=0,
        gradients_later=unsynced,
        gradients_step=0 if offload else gradients,
        cast_cache=0,
        gathered_forward=s.width * forward,
        gathered_backward=s.width * forward,
        gathered_end=s.width * (s.root + s.layer),
        buckets=0,
        head_gradient_work=s.width * s.head_trainable,
        # The head's gradient waits for the root's reduction at the end.
        layer_gradient_work=layer_work + s.width * s.head_trainable,
        end_gradient_work=root_gradients + FP32 * s.root_trainable,
        step_work=0 if offload else _native_step_work(s, hardware),
        host=parameters + gradients + optimizer if offload else 0,
    )


def _native_step_work(s: _Sizes, hardware: HardwareSpec) -> int:
    """Temporaries of torch's AdamW: none when fused (CUDA), one parameter's divisor when not."""
    if not s.adam or not hardware.gpu.is_cpu:
        return 0
    return 2 * s.per_shard(FP32 * s.largest_trainable)


def _bucket_elements(model: ModelSpec, plan: Plan) -> int:
    return plan.bucket_elements or model.hidden_size**2
