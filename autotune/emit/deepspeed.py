"""A plan as a DeepSpeed configuration, with the numerics contract spelled out.

What each key does in DeepSpeed 0.19.8, and where it is read, stands in ``docs/numerics.md``.
"""

from __future__ import annotations

from typing import Any, Literal

from autotune.plan import Engine, Plan
from autotune.spec.model import ModelSpec
from autotune.spec.workload import Precision, Workload

AUTO = "auto"
_MAX_LIVE_PARAMETERS = 10**9  # DeepSpeed's default, stated so that a new default changes nothing.
_SUB_GROUP_SIZE = 10**9  # likewise
_NEVER = 10**12
"""`steps_per_print`: the runner prints progress, DeepSpeed does not."""


def deepspeed_config(
    plan: Plan,
    model: ModelSpec,
    workload: Workload,
    *,
    device: Literal["cuda", "cpu"],
    max_grad_norm: float = 1.0,
) -> dict[str, Any]:
    """Return the configuration the runner gives to DeepSpeed, every value decided.

    ``train_batch_size`` counts every rank as data parallel: the runner splits sequences over the
    `cp` ranks itself and does not tell DeepSpeed, which shards over all ranks and averages
    gradients over all of them.

    Args:
        plan: A plan whose engine is DeepSpeed.
        model: Sizes the buckets.
        workload: Precision and optimizer.
        device: Host memory is pinned for CUDA alone; overlap needs CUDA streams.
        max_grad_norm: Clipping; 0 switches it off.

    Raises:
        ValueError: a plan of another engine.
    """
    config = _numerics(workload.precision)
    config["zero_optimization"] = _zero(plan, model, device=device)
    if plan.offload_optimizer:
        # DeepSpeed insists on its own CPU Adam unless told otherwise, and has no CPU SGD.
        config["zero_force_ds_cpu_optimizer"] = workload.optimizer == "adamw"
    return config | {
        "zero_allow_untested_optimizer": True,  # torch's SGD is not on DeepSpeed's list
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.grad_accum_steps,
        "train_batch_size": plan.micro_batch_size * plan.grad_accum_steps * plan.world_size,
        "gradient_clipping": max_grad_norm,
        "steps_per_print": _NEVER,
        "wall_clock_breakdown": False,
    }


def portable_deepspeed_config(
    plan: Plan, model: ModelSpec, workload: Workload, *, device: Literal["cuda", "cpu"]
) -> dict[str, Any]:
    """Return the configuration to put in a YAML that other tools read too.

    What the Hugging Face Trainer fills from its own arguments is "auto" (it refuses a number that
    differs from its own), and so are the buckets it sets to hidden squared when the plan does not
    choose them.
    """
    config = deepspeed_config(plan, model, workload, device=device)
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
                "train_batch_size", "gradient_clipping"):  # fmt: skip
        config[key] = AUTO
    del config["steps_per_print"]
    if not plan.bucket_elements:
        config["zero_optimization"]["reduce_bucket_size"] = AUTO
        if plan.zero_stage == 3:
            config["zero_optimization"]["stage3_prefetch_bucket_size"] = AUTO
    return config


def _numerics(precision: Precision) -> dict[str, Any]:
    """Return the keys of the numerics contract: fp32 reduction and accumulation, always."""
    return {
        "bf16": {"enabled": precision is Precision.BF16},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
    }


def _zero(plan: Plan, model: ModelSpec, *, device: Literal["cuda", "cpu"]) -> dict[str, Any]:
    if plan.engine is not Engine.DEEPSPEED:
        raise ValueError(f"a {plan.engine} plan has no DeepSpeed configuration")
    bucket = plan.bucket_elements or model.hidden_size**2
    pinned = device == "cuda"
    zero: dict[str, Any] = {
        "stage": plan.zero_stage,
        "overlap_comm": pinned,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if plan.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
    if plan.offload_params:
        zero["offload_param"] = {"device": "cpu", "pin_memory": pinned}
    if plan.zero_stage == 3:
        zero |= {
            "sub_group_size": _SUB_GROUP_SIZE,
            "stage3_prefetch_bucket_size": bucket,
            # The value the Hugging Face "auto" stands for (transformers.integrations.deepspeed).
            "stage3_param_persistence_threshold": 10 * model.hidden_size,
            "stage3_max_live_parameters": _MAX_LIVE_PARAMETERS,
            "stage3_max_reuse_distance": _MAX_LIVE_PARAMETERS,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    if plan.hpz > 1:
        zero["zero_hpz_partition_size"] = plan.hpz
    return zero
