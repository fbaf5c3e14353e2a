"""Which adapters, optimizers and kernels run with a plan; part of `autotune.rules`."""

from __future__ import annotations

from collections.abc import Callable

from autotune.float8_rules import FLOAT8_RULES
from autotune.plan import Engine, Plan, Recompute
from autotune.spec.hardware import HardwareSpec
from autotune.spec.model import ModelSpec
from autotune.spec.workload import LigerKernel, Workload

_Broken = tuple[str, str] | None
"""Message and hint, or None when the rule holds."""
_Rule = Callable[[Plan, ModelSpec, Workload, HardwareSpec], _Broken]

EIGHT_BIT = ("adamw_8bit", "paged_adamw_8bit")
LIGER_FAMILIES = frozenset({"llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma2",
                            "gemma3_text", "phi3", "olmo2", "smollm3"})  # fmt: skip
"""Model types of liger-kernel 0.8.5 (`MODEL_TYPE_TO_APPLY_LIGER_FN`) whose fused loss takes shifted
labels and which this project trains."""


def _dora_gathers(
    plan: Plan, model: ModelSpec, workload: Workload, hardware: HardwareSpec
) -> _Broken:
    adapter = workload.adapter
    if adapter is None or not adapter.dora or not adapter.base_storage or plan.zero_stage != 3:
        return None
    return (
        "DoRA over a base in 4 bits with ZeRO-3: to unpack the weights PEFT makes new parameters, "
        "which DeepSpeed has not sharded and cannot follow.",
        "Use fsdp2, zero1 or zero2, or leave peft_use_dora or load_in_4bit out.",
    )


def _eight_bit_shards(
    plan: Plan, model: ModelSpec, workload: Workload, hardware: HardwareSpec
) -> _Broken:
    if workload.optimizer not in EIGHT_BIT or plan.engine is not Engine.FSDP2:
        return None
    return (
        f"The optimizer {workload.optimizer} with FSDP2: bitsandbytes' kernels take whole tensors, "
        "FSDP2 hands the optimizer shards that are DTensors.",
        "Use DeepSpeed (zero1 to zero3) or DDP with it, or adamw with FSDP2.",
    )


def _eight_bit_stays_on_device(
    plan: Plan, model: ModelSpec, workload: Workload, hardware: HardwareSpec
) -> _Broken:
    if workload.optimizer not in EIGHT_BIT or not plan.offload_optimizer:
        return None
    return (
        f"The optimizer {workload.optimizer} with its states in host memory: DeepSpeed steps there "
        "by its own CPU Adam, whose states are fp32.",
        "Leave the optimizer offload out, or use adamw.",
    )


def _paged_needs_cuda(
    plan: Plan, model: ModelSpec, workload: Workload, hardware: HardwareSpec
) -> _Broken:
    if workload.optimizer != "paged_adamw_8bit" or not hardware.gpu.is_cpu:
        return None
    return (
        "The optimizer paged_adamw_8bit on CPU ranks: its states lie in CUDA managed memory, and "
        "without CUDA bitsandbytes keeps them unpaged.",
        "Use adamw_8bit on CPU ranks.",
    )


def _liger_needs_cuda(
    plan: Plan, model: ModelSpec, workload: Workload, hardware: HardwareSpec
) -> _Broken:
    if not workload.liger or not hardware.gpu.is_cpu:
        return None
    return (
        f"Liger's {', '.join(workload.liger)} on CPU ranks: its kernels are written in Triton, "
        "which compiles for GPUs alone.",
        "Leave the plugin and its liger_ keys out on CPU ranks, or use GPUs.",
    )


def _liger_knows_the_family(
    plan: Plan, model: ModelSpec, workload: Workload, hardware: HardwareSpec
) -> _Broken:
    kind = model.hf_config.get("model_type")
    if not workload.liger or kind in LIGER_FAMILIES:
        return None
    return (
        f"Liger's {', '.join(workload.liger)} on {model.name} (model_type {kind}): its kernels "
        "would not be put in.",
        f"Leave the liger_ keys out. Families that have them: {', '.join(sorted(LIGER_FAMILIES))}.",
    )


def _one_loss(plan: Plan, model: ModelSpec, workload: Workload, hardware: HardwareSpec) -> _Broken:
    if not workload.chunked_loss or LigerKernel.FUSED_LINEAR_CROSS_ENTROPY not in workload.liger:
        return None
    return (
        "chunked_cross_entropy and liger_fused_linear_cross_entropy are two ways to compute one "
        "loss.",
        "Keep one of them; Liger's needs less memory.",
    )


def _offloading_needs_cuda(
    plan: Plan, model: ModelSpec, workload: Workload, hardware: HardwareSpec
) -> _Broken:
    if not workload.activation_offloading or not hardware.gpu.is_cpu:
        return None
    return (
        "activation_offloading on CPU ranks: activations lie in host memory already.",
        "Leave it out on CPU ranks.",
    )


def _offloading_needs_recompute(
    plan: Plan, model: ModelSpec, workload: Workload, hardware: HardwareSpec
) -> _Broken:
    if not workload.activation_offloading or plan.recompute is Recompute.FULL:
        return None
    return (
        "activation_offloading without recomputation would send every activation of every layer "
        "to the host and back.",
        "Set gradient_checkpointing: true besides (Axolotl demands it, too).",
    )


TRAINING_RULES: dict[str, _Rule] = {
    "AT130": _dora_gathers,
    "AT132": _eight_bit_shards,
    "AT133": _eight_bit_stays_on_device,
    "AT134": _paged_needs_cuda,
    "AT135": _liger_needs_cuda,
    "AT136": _liger_knows_the_family,
    "AT137": _one_loss,
    "AT138": _offloading_needs_cuda,
    "AT139": _offloading_needs_recompute,
    **FLOAT8_RULES,
}
