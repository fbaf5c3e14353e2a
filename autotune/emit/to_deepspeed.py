"""A job as a DeepSpeed JSON, every value decided."""

from __future__ import annotations

import json
from typing import Any

from autotune.emit.deepspeed import deepspeed_config
from autotune.emit.job import (
    Exported,
    Job,
    cannot_say,
    lost_fields,
    lost_plan_keys,
    starts_one_host,
    training_keys,
)
from autotune.errors import AutotuneError
from autotune.plan import Engine

_LOST = ("recompute", "cp_backend", "heads_k_stride")
_SCRIPT = "Say it in your script."


def to_deepspeed(job: Job, file_name: str) -> Exported:
    """Return the JSON that `deepspeed.initialize` takes.

    Raises:
        AutotuneError: a plan of another engine.
    """
    plan = job.plan
    require_deepspeed(job, "deepspeed")
    config = standalone_config(job)
    if plan.cp > 1:
        # deepspeed.initialize makes its mesh of these two.
        config |= {"data_parallel_size": plan.dp_shard, "sequence_parallel_size": plan.cp}
    unsaid = lost_plan_keys(plan, _LOST) | training_keys(job, ("max_grad_norm",))
    warnings = cannot_say("DeepSpeed's JSON", unsaid, _SCRIPT)
    warnings += starts_one_host(plan, "name them in a --hostfile and leave --num_gpus out")
    return Exported(
        files={file_name: json_text(config)},
        command=f"deepspeed --num_gpus {plan.world_size} SCRIPT --deepspeed_config {file_name}",
        warnings=tuple(warnings),
        lost=lost_fields(plan, _LOST),
    )


def standalone_config(job: Job) -> dict[str, Any]:
    """Return the DeepSpeed mapping, where DeepSpeed or accelerate split the sequences.

    They count `cp` ranks as one in the batch, where the runner here counts all ranks.
    """
    config = deepspeed_config(
        job.plan,
        job.model,
        job.workload,
        device=job.device,
        max_grad_norm=job.train.max_grad_norm,
    )
    config["train_batch_size"] = job.plan.global_batch_size
    del config["steps_per_print"]
    return config


def require_deepspeed(job: Job, target: str) -> None:
    """Refuse a plan of another engine.

    Raises:
        AutotuneError: names the targets that take it.
    """
    if job.plan.engine is not Engine.DEEPSPEED:
        raise AutotuneError(
            f"--to {target}: engine {job.plan.engine} (strategy {job.plan.strategy}) has no "
            "DeepSpeed configuration. Use --to axolotl, accelerate, llamafactory or torchtitan."
        )


def json_text(config: dict[str, Any]) -> str:
    """Return JSON as the shipped presets are written."""
    return json.dumps(config, indent=2) + "\n"
