"""Which models and plans tensor parallelism can split; part of `autotune.rules`."""

from __future__ import annotations

import math

from autotune.plan import CpBackend, Engine, Plan
from autotune.spec.model import ModelSpec, QkNorm
from autotune.spec.workload import Workload

_Broken = tuple[str, str] | None
"""Message and hint, or None when the rule holds."""


def tensor_parallel_splits(plan: Plan, model: ModelSpec, workload: Workload) -> _Broken:
    """Say what keeps a plan's `tp` ranks from sharing the projections of every layer."""
    if plan.tp == 1:
        return None
    if plan.engine is not Engine.FSDP2:
        return (
            f"Tensor parallelism (tp {plan.tp}) runs under FSDP2 alone; the engine is "
            f"{plan.engine}.",
            "Use fsdp2 or hsdp, or tp 1.",
        )
    uneven = [f"{size} {what}" for what, size in _split(model).items() if size % plan.tp]
    if uneven:
        most = math.gcd(*_split(model).values())
        legal = ", ".join(str(degree) for degree in range(1, most + 1) if most % degree == 0)
        return (
            f"Tensor parallelism over {plan.tp} ranks gives each an equal part of every "
            f"projection; {' and '.join(uneven)} do not divide by {plan.tp}.",
            f"Degrees that do: {legal}.",
        )
    refused = [what for what, given in _never_run(plan, model, workload).items() if given]
    if not refused:
        return None
    return (
        f"Tensor parallelism (tp {plan.tp}) with {' and '.join(refused)} is not run here.",
        "Use tp 1, or leave the other out.",
    )


def _split(model: ModelSpec) -> dict[str, int]:
    return {
        "attention heads": model.num_heads,
        "key-value heads": model.num_kv_heads,
        "features of the FFN": model.ffn_size,
        "entries of the vocabulary": model.vocab_size,
    }


def _never_run(plan: Plan, model: ModelSpec, workload: Workload) -> dict[str, bool]:
    """Return what would come out wrong, or was never seen to come out right."""
    return {
        "experts": model.moe is not None,
        "attention sinks": model.sinks,
        "fused projections": model.fused_projections,
        # Its mean square is over the heads of all ranks.
        "a norm over all heads together": model.qk_norm is QkNorm.WIDTH,
        "a family whose layers are not known": model.counted is not None,
        "attention_dropout": bool(model.hf_config.get("attention_dropout")),
        "an adapter": workload.adapter is not None,
        "Liger's kernels": bool(workload.liger),
        "activation_offloading": workload.activation_offloading,
        "fp8": workload.fp8,
        "offload to the host": plan.offload_params or plan.offload_optimizer,
        "ring attention": plan.cp > 1 and plan.cp_backend is CpBackend.RING,
    }
