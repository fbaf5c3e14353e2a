"""Which plans, models and devices multiply in 8-bit floats; part of `autotune.rules`."""

from __future__ import annotations

from collections.abc import Callable

from autotune.plan import Engine, Plan, Recompute
from autotune.spec.float8 import STEP, num_float8_projections
from autotune.spec.hardware import HardwareSpec
from autotune.spec.model import ModelSpec
from autotune.spec.workload import Precision, Workload

_Broken = tuple[str, str] | None
"""Message and hint, or None when the rule holds."""


def _device_has_it(
    plan: Plan, model: ModelSpec, workload: Workload, hardware: HardwareSpec
) -> _Broken:
    gpu = hardware.gpu
    if not workload.fp8 or gpu.is_cpu or gpu.fp8_flops is not None:
        return None
    return (
        f"fp8 on {gpu.name}, of which no rate of products of 8-bit floats is known: NVIDIA's have "
        "them from compute capability 8.9 on (Ada, Hopper, Blackwell).",
        "Leave fp8 out, or use such a GPU; one of your own says tflops.fp8 in its file "
        "(docs/capacity.md).",
    )


def _trains_all_weights(
    plan: Plan, model: ModelSpec, workload: Workload, hardware: HardwareSpec
) -> _Broken:
    if not workload.fp8 or workload.adapter is None:
        return None
    return (
        "fp8 with an adapter: torchao's backward computes the gradients of frozen weights as well "
        "and drops them, and weights in 4 bits are no linear layers it could replace.",
        "Train all parameters with fp8, or leave fp8 out.",
    )


def _shapes_fit(
    plan: Plan, model: ModelSpec, workload: Workload, hardware: HardwareSpec
) -> _Broken:
    if not workload.fp8:
        return None
    if not num_float8_projections(model):
        return (
            f"fp8 with {model.name}: no projection has two sides that are multiples of {STEP}, as "
            "products of 8-bit floats need.",
            "Leave fp8 out.",
        )
    tokens = plan.micro_batch_size * workload.seq_len // plan.cp
    if hardware.gpu.is_cpu or not tokens % STEP:
        return None
    return (
        f"fp8 with {tokens} tokens of a micro-batch on a rank: a weight's gradient sums over them, "
        f"and products of 8-bit floats sum over multiples of {STEP}.",
        f"Use a seq_len / cp that is a multiple of {STEP}.",
    )


def _rest_in_bf16(
    plan: Plan, model: ModelSpec, workload: Workload, hardware: HardwareSpec
) -> _Broken:
    if not workload.fp8 or workload.precision is Precision.BF16 or hardware.gpu.is_cpu:
        return None
    return (
        "fp8 with fp32 between the projections was never run on a GPU.",
        "Use bf16 with fp8 (--precision bf16, bf16: true), or leave fp8 out.",
    )


def _weights_are_released(
    plan: Plan, model: ModelSpec, workload: Workload, hardware: HardwareSpec
) -> _Broken:
    if not workload.fp8 or plan.zero_stage != 3 or plan.recompute is Recompute.FULL:
        return None
    return (
        "fp8 with ZeRO-3 without recomputation: torchao keeps each gathered weight for backward, "
        "so a rank would hold all of them at the end of forward.",
        "Set gradient_checkpointing: true besides, or use fsdp2, zero1 or zero2.",
    )


def _gathers_in_float8(
    plan: Plan, model: ModelSpec, workload: Workload, hardware: HardwareSpec
) -> _Broken:
    if not workload.fp8_all_gather or (workload.fp8 and plan.engine is Engine.FSDP2):
        return None
    given = f"with {plan.engine}" if workload.fp8 else "without fp8"
    return (
        f"fp8_enable_fsdp_float8_all_gather {given}: FSDP2 gathers the weights of float8 "
        "projections in float8, nothing else does.",
        "Leave it out." if workload.fp8 else "Add fp8: true, or leave it out.",
    )


FLOAT8_RULES: dict[str, Callable[[Plan, ModelSpec, Workload, HardwareSpec], _Broken]] = {
    "AT140": _device_has_it,
    "AT141": _trains_all_weights,
    "AT142": _weights_are_released,
    "AT143": _shapes_fit,
    "AT144": _rest_in_bf16,
    "AT145": _gathers_in_float8,
}
