"""A job as a config file for `accelerate launch --config_file`."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from autotune.emit.axolotl import decoder_layer_class
from autotune.emit.axolotl_keys import comment, yaml_text
from autotune.emit.job import (
    RANKS_A_NODE,
    Exported,
    Job,
    cannot_say,
    cp_words,
    fsdp2_reduction,
    lost_fields,
    lost_plan_keys,
    training_keys,
)
from autotune.emit.to_deepspeed import json_text, standalone_config
from autotune.errors import AutotuneError
from autotune.plan import Engine, Plan, Recompute
from autotune.spec.workload import Precision

_SCRIPT = "Say it in your script."
_FLOAT8 = {"fp8", "fp8_enable_fsdp_float8_all_gather"}
"""Keys of `mixed_precision` and `fp8_config`, which it refuses beside a DeepSpeed file."""
_LOST = {
    Engine.DDP: ("micro_batch_size", "grad_accum_steps", "recompute"),
    Engine.FSDP2: ("micro_batch_size", "grad_accum_steps", "cp_backend", "heads_k_stride"),
    Engine.DEEPSPEED: ("recompute", "cp_backend", "heads_k_stride"),
}
"""Fields of the plan without a word in accelerate's file, by engine."""


def to_accelerate(job: Job, file_name: str) -> Exported:
    """Return the YAML and, for DeepSpeed, the JSON beside it.

    Raises:
        AutotuneError: FSDP2 or DeepSpeed on CPU ranks (accelerate runs DDP there without a word),
            or sequence parallelism under DDP.
    """
    plan = job.plan
    _check(job)
    files: dict[str, str] = {}
    keys: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": _distributed_type(job),
        "num_machines": 1,
        "machine_rank": 0,
        "num_processes": plan.world_size,
        "main_training_function": "main",
        "use_cpu": job.device == "cpu",
    }
    warnings = []
    if plan.engine is Engine.DEEPSPEED:
        json_name = f"{PurePath(file_name).stem}.deepspeed.json"
        files[json_name] = json_text(standalone_config(job))
        # accelerate refuses precision and stage here once a file says them.
        keys["deepspeed_config"] = {
            "deepspeed_config_file": json_name,
            "zero3_init_flag": plan.zero_stage == 3,
        }
    else:
        keys |= _precision(job)
    if plan.engine is Engine.FSDP2:
        keys["fsdp_config"] = _fsdp(job)
    if job.train.torch_compile:
        keys["dynamo_config"] = {"dynamo_backend": "INDUCTOR"}
    if mesh := _mesh(job):
        keys["parallelism_config"] = mesh
    if plan.cp > 1 and plan.engine is Engine.FSDP2:
        warnings.append(
            f"context_parallel_size: {plan.cp} is torch's context parallelism under FSDP2 in "
            f"accelerate, measured here was {cp_words(plan)}: memory and speed differ"
            + ("; it does not take sample_packing." if job.workload.packing else ".")
        )
    if plan.tp > 1:
        warnings.append(
            f"tensor_parallel_size: {plan.tp}: accelerate makes the mesh, your script has to load "
            "the model split over it (transformers' tp_plan), or it trains unsplit without a word."
        )
    warnings += fsdp2_reduction(job) + several_nodes(plan)
    said = {"torch_compile"}
    if plan.engine is Engine.DEEPSPEED:
        said.add("max_grad_norm")
    elif job.workload.fp8:
        said |= _FLOAT8
    unsaid = lost_plan_keys(plan, _LOST[plan.engine]) | training_keys(job, said)
    if "fp8" in said and job.workload.precision is Precision.FP32:
        unsaid["bf16"] = False  # its fp8 computes the rest in bf16
    warnings += cannot_say("accelerate's file", unsaid, _SCRIPT)
    lines = [f"{job.model.name} on {plan.world_size} ranks, {plan.describe()}.", *warnings]
    return Exported(
        files={file_name: comment(lines) + yaml_text(keys)} | files,
        command=f"accelerate launch --config_file {file_name} SCRIPT",
        warnings=tuple(warnings),
        lost=lost_fields(plan, _LOST[plan.engine]),
    )


def _precision(job: Job) -> dict[str, Any]:
    workload = job.workload
    if not workload.fp8:
        return {"mixed_precision": "bf16" if workload.precision is Precision.BF16 else "no"}
    return {
        "mixed_precision": "fp8",
        "fp8_config": {
            "backend": "AO",
            "enable_fsdp_float8_all_gather": workload.fp8_all_gather,
            "pad_inner_dim": False,
        },
    }


def several_nodes(plan: Plan) -> list[str]:
    """Return the warning that a file for more ranks than a node has names no nodes; or none."""
    if plan.world_size <= RANKS_A_NODE:
        return []
    return [
        "num_machines is written as 1: state it with main_process_ip and machine_rank for "
        f"{plan.world_size} ranks on several nodes."
    ]


def _check(job: Job) -> None:
    plan = job.plan
    if job.device == "cpu" and plan.engine is not Engine.DDP:
        raise AutotuneError(
            f"--device cpu: accelerate runs DDP on CPU ranks whatever the file says, and this plan "
            f"is {plan.strategy}. Leave --device out, or use a ddp plan."
        )
    if plan.engine is Engine.DDP and plan.cp > 1:
        raise AutotuneError(
            f"context_parallel_size {plan.cp} under DDP: accelerate needs FSDP2 or DeepSpeed for "
            "it. Use such a plan."
        )


def _distributed_type(job: Job) -> str:
    if job.plan.engine is not Engine.DDP:
        return {Engine.DEEPSPEED: "DEEPSPEED", Engine.FSDP2: "FSDP"}[job.plan.engine]
    if job.plan.world_size == 1:
        return "NO"
    # MULTI_CPU would start a single process unless MPI is there; torchrun starts them all.
    return "MULTI_GPU"


def _fsdp(job: Job) -> dict[str, Any]:
    plan, adapter = job.plan, job.workload.adapter
    layer = decoder_layer_class(job.model)
    return {
        "fsdp_version": 2,
        "fsdp_reshard_after_forward": plan.reshard_after_forward,
        "fsdp_offload_params": plan.offload_params,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        **({"fsdp_transformer_layer_cls_to_wrap": layer} if layer else {}),
        "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        # A base in 4 bits is quantised by every rank: rank 0 alone would have nothing to send.
        # accelerate refuses it with float8.
        "fsdp_cpu_ram_efficient_loading": not (
            (adapter and adapter.base_storage) or job.workload.fp8
        ),
        "fsdp_activation_checkpointing": plan.recompute is Recompute.FULL,
    }


def _mesh(job: Job) -> dict[str, Any]:
    """Return `parallelism_config`, where the default (all ranks shard) is not meant."""
    plan = job.plan
    if plan.engine is Engine.DEEPSPEED:
        if plan.cp == 1:
            return {}
        packed = job.workload.packing
        return _prefixed({
            "dp_shard_size": plan.dp_shard,
            "sp_size": plan.cp,
            "sp_backend": "deepspeed",
            "sp_seq_length": job.workload.seq_len,
            "sp_seq_length_is_variable": not packed,
            # SDPA there looks across the documents of a packed sequence.
            "sp_attn_implementation": "flash_attention_2" if packed else "sdpa",
        })  # fmt: skip
    if plan.engine is Engine.FSDP2 and (plan.cp > 1 or plan.tp > 1 or plan.dp_replicate > 1):
        return _prefixed({
            "dp_replicate_size": plan.dp_replicate,
            "dp_shard_size": plan.dp_shard,
            "tp_size": plan.tp,
            "cp_size": plan.cp,
            **({"cp_backend": "torch", "cp_comm_strategy": "allgather"} if plan.cp > 1 else {}),
        })  # fmt: skip
    return {}


def _prefixed(values: dict[str, Any]) -> dict[str, Any]:
    return {f"parallelism_config_{key}": value for key, value in values.items()}
