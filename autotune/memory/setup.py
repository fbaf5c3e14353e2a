"""`TraceKey`: everything that decides what the model's code allocates; `Setup`: how a run trains.

The runner has one setup for each workload and plan (`setup_of`). Other tools train differently
(pure bf16, 8-bit optimizers, a quantised base, another loss): the same estimator covers them
through other values, which is how it is compared with published measurements.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from autotune.plan import CpBackend, Engine, Plan, Recompute
from autotune.spec.hardware import HardwareSpec
from autotune.spec.model import ModelSpec
from autotune.spec.workload import BaseStorage, LigerKernel, Lora, Precision, Workload


class Regime(StrEnum):
    """Which types the forward pass sees."""

    COMPUTE = "compute"
    """Weights and hidden states in the compute type: DeepSpeed in bf16, pure bf16."""
    FSDP = "fsdp"
    """Weights in the compute type, each layer's input cast to it and its output to fp32: FSDP2
    with ``output_dtype=float32``."""
    AUTOCAST = "autocast"
    """fp32 weights and hidden states, matrix products in bf16: DDP in bf16."""
    FP32 = "fp32"


class Attention(StrEnum):
    """The path attention takes."""

    RUNNER = "runner"
    """This project's function on SDPA: causal without a mask, or block-diagonal when packed."""
    RING = "ring"
    """This project's function on ring-flash-attn: no mask, keys and values of other ranks."""
    SDPA = "sdpa"
    """transformers' own, causal without a mask."""
    FLASH = "flash"
    """A fused kernel that knows lengths: packed batches need no mask."""
    EAGER = "eager"
    """Scores and probabilities kept in full."""


class Loss(StrEnum):
    """How logits become the loss."""

    PLAIN = "plain"
    """This project's: fp32 cross-entropy, logits dropped once they are cast."""
    TRANSFORMERS = "transformers"
    """transformers' own: the mean over an fp32 copy of the logits."""
    CHUNKED = "chunked"
    """Cross-entropy over slices of the tokens, logits kept in the compute type."""
    RECOMPUTED = "recomputed"
    """This project's over slices of the tokens, each computed again in backward; logits kept in
    the compute type."""
    FUSED_LINEAR = "fused_linear"
    """Head and loss in one kernel over slices of the tokens; no logits kept (Liger)."""


class Float8(StrEnum):
    """What multiplies projections that are in 8-bit floats."""

    HARDWARE = "hardware"
    """The device's own products, which allocate their output alone."""
    EMULATED = "emulated"
    """fp32 products of fp32 copies: CPU ranks."""


class Checkpointing(StrEnum):
    """What backward computes again."""

    NONE = "none"
    FULL = "full"
    """`torch.utils.checkpoint` of each layer, non-reentrant."""
    REENTRANT = "reentrant"
    """The older form, which ZeRO-3 needs."""
    SELECTIVE = "selective"
    """Matrix products and attention are kept, the rest is computed again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceKey:
    """Decides, with the model, an `ActivationProfile`."""

    regime: Regime
    packed: bool = False
    """Several documents in a sequence."""
    attention: Attention = Attention.RUNNER
    exchanged: bool = False
    """Sequence parallel (``cp > 1``): attention swaps tokens for heads, or is a ring."""
    single: bool = False
    """Exchanged, and the micro-batch is one sequence: some copies fall away."""
    gathered: tuple[int, int] = (0, 0)
    """Ring over packed sequences: ranks whose keys and values are gathered, and heads at a time."""
    windowed: bool = False
    """The sequence is longer than the model's window."""
    checkpointing: Checkpointing = Checkpointing.NONE
    loss: Loss = Loss.PLAIN
    fused_kernels: bool = False
    """Liger's norms, rotary embedding and SwiGLU."""
    adapter: Lora | None = None
    float8: Float8 | None = None
    """Projections in 8-bit floats; None: in the compute type."""


class Optimizer(StrEnum):
    """What keeps states beside the weights."""

    ADAMW = "adamw"
    ADAMW_8BIT = "adamw_8bit"
    PAGED_ADAMW_8BIT = "paged_adamw_8bit"
    ADAFACTOR = "adafactor"
    LION = "lion"
    MUON = "muon"
    SGD = "sgd"
    SGD_MOMENTUM = "sgd_momentum"


class Quantised(StrEnum):
    """Storage of a frozen base model."""

    NF4 = "nf4"
    NF4_DOUBLE = "nf4_double"
    INT8 = "int8"
    GPTQ = "gptq"
    """4 bits in groups of 128 with a zero point each (AutoGPTQ)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """How a run trains, beyond its plan."""

    key: TraceKey
    parameter_bytes: int = 4
    """Of one stored weight: 4 fp32 (DDP, FSDP2), 2 bf16 (DeepSpeed, pure bf16)."""
    compute_bytes: int = 2
    master_weights: bool = False
    """An fp32 copy beside bf16 weights: DeepSpeed in bf16."""
    gradient_bytes: int = 4
    """Of one accumulated gradient."""
    reduce_bytes: int = 4
    """Of one element in a reduction."""
    optimizer: Optimizer = Optimizer.ADAMW
    state_bytes: int = 4
    """Of one element of an optimizer state that is not quantised."""
    foreach: bool = False
    """The optimizer steps over all parameters at once, with temporaries of their size."""
    fused: bool = False
    """The optimizer is one kernel, without temporaries."""
    quantised: Quantised | None = None
    flat_units: bool = False
    """FSDP1: each unit is one flat parameter, kept in the stored type."""


def trace_key(
    model: ModelSpec, workload: Workload, plan: Plan, *, on_cpu: bool = False
) -> TraceKey:
    """Return what decides a plan's activations under this project's runner."""
    fp32 = workload.precision is Precision.FP32
    ring = plan.cp > 1 and plan.cp_backend is CpBackend.RING
    return TraceKey(
        regime=Regime.FP32 if fp32 else _BF16_REGIMES[plan.engine],
        packed=workload.packing,
        attention=Attention.RING if ring else Attention.RUNNER,
        exchanged=plan.cp > 1,
        single=plan.cp > 1 and plan.micro_batch_size == 1,
        gathered=(plan.cp, plan.heads_k_stride) if ring and workload.packing else (0, 0),
        windowed=model.num_window_layers_at(workload.seq_len) > 0,
        checkpointing=_checkpointing(plan),
        loss=_loss(workload),
        fused_kernels=_FUSED <= set(workload.liger),
        adapter=_allocating(workload.adapter),
        float8=(Float8.EMULATED if on_cpu else Float8.HARDWARE) if workload.fp8 else None,
    )


def _loss(workload: Workload) -> Loss:
    if LigerKernel.FUSED_LINEAR_CROSS_ENTROPY in workload.liger:
        return Loss.FUSED_LINEAR
    return Loss.RECOMPUTED if workload.chunked_loss else Loss.PLAIN


def unestimated(workload: Workload) -> list[str]:
    """Return what a workload asks for that the memory estimate has no term for."""
    some = [str(kernel) for kernel in workload.liger if kernel in _FUSED]
    missing = [] if _FUSED <= set(workload.liger) else [f"Liger's {kernel}" for kernel in some]
    missing += ["activation offloading"] * workload.activation_offloading
    return missing + ["the smaller gather in fp8"] * workload.fp8_all_gather


_FUSED = {LigerKernel.ROPE, LigerKernel.RMS_NORM, LigerKernel.GLU_ACTIVATION}
"""What `fused_kernels` stands for; with some of them alone the estimate is without any."""


def _allocating(adapter: Lora | None) -> Lora | None:
    """Return an adapter without what changes no activation: its scale and the base's storage."""
    if adapter is None:
        return None
    return adapter.model_copy(update={"rslora": False, "base_storage": None})


def setup_of(model: ModelSpec, workload: Workload, plan: Plan, hardware: HardwareSpec) -> Setup:
    """Return how this project's runner trains a plan."""
    fp32 = workload.precision is Precision.FP32
    deepspeed = plan.engine is Engine.DEEPSPEED
    on_cpu = hardware.gpu.is_cpu
    adamw = workload.optimizer == "adamw"
    storage = workload.adapter and workload.adapter.base_storage
    # autotune.runner.engines: torch's fused AdamW where every parameter is on the device.
    fused = adamw and not (deepspeed or on_cpu or plan.offload_params)
    return Setup(
        key=trace_key(model, workload, plan, on_cpu=on_cpu),
        parameter_bytes=2 if deepspeed and not fp32 else 4,
        compute_bytes=4 if fp32 else 2,
        master_weights=deepspeed,
        optimizer=Optimizer(workload.optimizer),
        quantised=_STORAGES[storage] if storage else None,
        # torch takes it by itself for parameters on CUDA.
        foreach=workload.optimizer in ("adamw", "sgd")
        and not (fused or on_cpu or plan.offload_optimizer),
        fused=fused,
    )


_STORAGES = {
    BaseStorage.NF4: Quantised.NF4,
    BaseStorage.NF4_DOUBLE: Quantised.NF4_DOUBLE,
}
_BF16_REGIMES = {
    Engine.DDP: Regime.AUTOCAST,
    Engine.DEEPSPEED: Regime.COMPUTE,
    Engine.FSDP2: Regime.FSDP,
}


def _checkpointing(plan: Plan) -> Checkpointing:
    if plan.recompute is Recompute.NONE:
        return Checkpointing.NONE
    return Checkpointing.REENTRANT if plan.zero_stage == 3 else Checkpointing.FULL
