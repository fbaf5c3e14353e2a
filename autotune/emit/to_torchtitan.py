"""A job as a torchtitan command: since 0.3 torchtitan reads no file, its flags are its format."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from typing import Any

from autotune.emit.job import (
    RANKS_A_NODE,
    Exported,
    Job,
    cannot_say,
    cp_words,
    training_keys,
)
from autotune.errors import AutotuneError
from autotune.plan import Engine, Recompute
from autotune.spec.workload import Precision

# By catalogue name, as torchtitan 0.3.0 names them (`torchtitan/models/*/config_registry.py`).
MODELS: Mapping[str, tuple[str, str]] = {
    "qwen3-0.6b": ("qwen3", "qwen3_0_6b"),
    "qwen3-1.7b": ("qwen3", "qwen3_1_7b"),
    "qwen3-14b": ("qwen3", "qwen3_14b"),
    "qwen3-32b": ("qwen3", "qwen3_32b"),
    "qwen3-30b-a3b": ("qwen3", "qwen3_30b_a3b"),
    "llama-3.1-8b": ("llama3", "llama3_8b"),
    "llama-3.1-70b": ("llama3", "llama3_70b"),
    "llama-3.1-405b": ("llama3", "llama3_405b"),
    "gpt-oss-20b": ("gpt_oss", "gpt_oss_20b"),
    "gpt-oss-120b": ("gpt_oss", "gpt_oss_120b"),
}
_IN_FLOAT8 = "llama3_405b"
"""Its configuration swaps projections for float8 ones."""
_PLACEHOLDER = "${TORCHTITAN_MODEL:?set it to: --module MODULE --config CONFIG}"
_DECAYS = {"cosine": "cosine", "linear": "linear"}


def to_torchtitan(job: Job, file_name: str) -> Exported:
    """Return a shell script that starts torchtitan with the plan.

    Raises:
        AutotuneError: DeepSpeed, an adapter, DDP with sequence parallelism, or offload of one half
            of the states: torchtitan has none of them.
    """
    _check(job)
    plan = job.plan
    flags = torchtitan_flags(job)
    warnings = []
    model = _model(job)
    if model is None:
        warnings.append(
            f"base_model: {job.base_model}: torchtitan names no such model; set TORCHTITAN_MODEL "
            f"before running. Known: {', '.join(MODELS)}."
        )
    if model is not None and model.endswith(_IN_FLOAT8):
        warnings.append(
            f"{_IN_FLOAT8} of torchtitan trains in float8, which was not measured here: memory and "
            "speed differ."
        )
    if plan.cp > 1:
        warnings.append(
            f"context_parallel_size: {plan.cp} is torch's context parallelism in torchtitan, "
            f"measured here was {cp_words(plan)}: memory and speed differ."
        )
    nodes = _nodes_of(plan.world_size)
    if nodes > 1:
        warnings.append(
            f"{nodes} nodes: run the script on each, with RDZV_ENDPOINT set to the first one's "
            "HOST:PORT."
        )
    warnings += cannot_say("torchtitan's command", _unsaid(job),
                           "Say it in a config function of your own.")  # fmt: skip
    words = [f"{job.model.name} on {plan.world_size} ranks, {plan.describe()}.", *warnings]
    return Exported(
        files={file_name: _script(words, plan.world_size, nodes, model or _PLACEHOLDER, flags)},
        command=f"sh {file_name}",
        warnings=tuple(warnings),
    )


def torchtitan_flags(job: Job) -> list[str]:
    """Return the flags of torchtitan 0.3 that say the plan and what goes with it."""
    plan, train = job.plan, job.train
    bf16 = job.workload.precision is Precision.BF16
    values: dict[str, Any] = {
        "training.local_batch_size": plan.micro_batch_size,
        "training.global_batch_size": plan.global_batch_size,
        "training.seq_len": job.workload.seq_len,
        "training.max_norm": train.max_grad_norm,
        "training.dtype": "float32",
        "training.mixed_precision_param": "bfloat16" if bf16 else "float32",
        "training.mixed_precision_reduce": "float32",
        "parallelism.data_parallel_replicate_degree": plan.dp_replicate,
        "parallelism.data_parallel_shard_degree": plan.dp_shard,
        "parallelism.tensor_parallel_degree": plan.tp,
        "parallelism.context_parallel_degree": plan.cp,
        "parallelism.fsdp_reshard_after_forward": (
            "always" if plan.reshard_after_forward else "never"
        ),
        "lr_scheduler.warmup_steps": train.warmup_steps,
        "debug.seed": job.seed,
        "dump_folder": job.output_dir,
    }
    if train.lr_scheduler in _DECAYS:
        values["lr_scheduler.decay_type"] = _DECAYS[train.lr_scheduler]
    if train.max_steps is not None:
        values["training.steps"] = train.max_steps
    if os.path.isdir(job.base_model):
        values["hf_assets_path"] = job.base_model
    flags = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    if plan.offload_params:
        flags.append("--training.enable_cpu_offload")
    if train.torch_compile:
        flags.append("--compile.enable")
    # A subcommand of the flag parser, so it stands last.
    mode = "full" if plan.recompute is Recompute.FULL else "none"
    return [*flags, f"activation_checkpoint:{mode}"]


def _check(job: Job) -> None:
    plan = job.plan
    if plan.engine is Engine.DEEPSPEED:
        raise AutotuneError(
            f"--to torchtitan: it has no DeepSpeed, and this plan is {plan.strategy}. Use --to "
            "axolotl, accelerate, deepspeed or llamafactory."
        )
    if job.workload.adapter is not None:
        raise AutotuneError(
            "--to torchtitan: an adapter (adapter: lora, qlora) has no flag there, and without it "
            "all parameters would be trained. Use --to axolotl or llamafactory."
        )
    if plan.engine is Engine.DDP and plan.cp > 1:
        raise AutotuneError(
            f"--to torchtitan: context_parallel_size {plan.cp} always shards the states there, "
            "and this plan is ddp. Use an fsdp2 plan."
        )
    if plan.offload_params != plan.offload_optimizer:
        raise AutotuneError(
            "--to torchtitan: it offloads parameters and optimizer together, this plan one of them."
        )


def _nodes_of(ranks: int) -> int:
    """Return the fewest nodes of at most 8 ranks that each start equally many."""
    fewest = -(-ranks // RANKS_A_NODE)
    return next(nodes for nodes in range(fewest, ranks + 1) if ranks % nodes == 0)


def _model(job: Job) -> str | None:
    known = MODELS.get(job.model.name)
    return None if known is None else f"--module {known[0]} --config {known[1]}"


def _unsaid(job: Job) -> dict[str, Any]:
    workload, train = job.workload, job.train
    said = {"base_model", "sequence_len", "max_grad_norm", "warmup_steps", "seed", "torch_compile"}
    if workload.optimizer == "adamw":
        said.add("optimizer")
    if workload.packing:  # it always packs
        said.add("sample_packing")
    if train.lr_scheduler in _DECAYS:
        said.add("lr_scheduler")
    if train.max_steps is not None:
        said |= {"max_steps", "num_epochs"}
    keys = training_keys(job, said)
    if train.max_steps is None:
        keys["num_epochs"] = train.num_epochs
    return keys


def _script(words: list[str], world: int, nodes: int, model: str, flags: list[str]) -> str:
    head = "".join(f"# {' '.join(word.split())}\n" for word in words)
    torchrun = f"torchrun --nproc_per_node {world // nodes}"
    if nodes > 1:
        torchrun += (
            f" --nnodes {nodes} --rdzv_backend c10d --rdzv_endpoint "
            '"${RDZV_ENDPOINT:?set it to HOST:PORT of the first node}"'
        )
    lines = [f"exec {torchrun} -m torchtitan.train", model]
    position = 0
    while position < len(flags):
        pair = position + 1 < len(flags) and not flags[position + 1].startswith(("--", "activ"))
        lines.append(" ".join(shlex.quote(word) for word in flags[position : position + 1 + pair]))
        position += 1 + pair
    return "#!/bin/sh\n" + head + " \\\n  ".join(lines) + "\n"
