"""A job as a LLaMA-Factory YAML, with the DeepSpeed JSON or the accelerate file beside it."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from autotune.emit.axolotl_keys import OPTIMIZER_NAMES, comment, yaml_text
from autotune.emit.job import (
    Exported,
    Job,
    cannot_say,
    fsdp2_reduction,
    starts_one_host,
    training_keys,
)
from autotune.emit.to_accelerate import several_nodes, to_accelerate
from autotune.emit.to_deepspeed import json_text, standalone_config
from autotune.errors import AutotuneError
from autotune.plan import Engine, Recompute
from autotune.spec.workload import BaseStorage, Precision

# What `_model_keys`, `_data_keys` and `_train_keys` write.
_SAID = frozenset({
    "base_model", "adapter", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules",
    "peft_use_rslora", "peft_use_dora", "load_in_4bit", "bnb_config_kwargs", "sequence_len",
    "sample_packing", "val_set_size", "train_on_inputs", "optimizer", "learning_rate",
    "lr_scheduler", "warmup_steps", "warmup_ratio", "weight_decay", "adam_beta1", "adam_beta2",
    "adam_epsilon", "max_grad_norm", "num_epochs", "max_steps", "logging_steps", "eval_steps",
    "eval_batch_size", "save_steps", "save_total_limit", "torch_compile", "seed", "datasets",
})  # fmt: skip
_LAUNCHER = "$(python -c 'import llamafactory; print(llamafactory.__path__[0])')/launcher.py"


def to_llamafactory(job: Job, file_name: str) -> Exported:
    """Return the files.

    DeepSpeed and DDP start with `llamafactory-cli`; FSDP2 as LLaMA-Factory's own examples do, by
    accelerate with a config file of its own.

    Raises:
        AutotuneError: sequence or tensor parallelism, which LLaMA-Factory has no word for.
    """
    plan = job.plan
    if plan.cp > 1:
        raise AutotuneError(
            f"--to llamafactory: context_parallel_size {plan.cp} has no word there. Use --to "
            "axolotl, or a plan with cp=1."
        )
    if plan.tp > 1:
        raise AutotuneError(
            f"--to llamafactory: tensor_parallel_size {plan.tp} has no word there that loads the "
            "model split. Use --to axolotl or torchtitan, or a plan with tp=1."
        )
    keys = _model_keys(job) | _data_keys(job) | _train_keys(job)
    files: dict[str, str] = {}
    stem = PurePath(file_name).stem
    command = (
        f"FORCE_TORCHRUN=1 NPROC_PER_NODE={plan.world_size} llamafactory-cli train {file_name}"
    )
    warnings = cannot_say("LLaMA-Factory", _unsaid(job), "The export is without them.")
    if job.workload.packing and _plain_text(job):
        warnings.append(
            "sample_packing: LLaMA-Factory's stage pt lets tokens of a packed sequence look at the "
            "documents before theirs; here attention stays inside each."
        )
    if plan.engine is Engine.DEEPSPEED:
        name = f"{stem}.deepspeed.json"
        keys["deepspeed"] = name
        files[name] = json_text(standalone_config(job))
    elif plan.engine is Engine.FSDP2:
        name = f"{stem}.accelerate.yaml"
        beside = to_accelerate(job, name)
        files[name] = beside.files[name]
        warnings += fsdp2_reduction(job) + several_nodes(plan)
        command = f"accelerate launch --config_file {name} {_LAUNCHER} {file_name}"
        if plan.recompute is Recompute.FULL:
            # Said once, by the file of the engine: twice would recompute twice.
            keys["disable_gradient_checkpointing"] = True
    if plan.engine is not Engine.FSDP2:
        warnings += starts_one_host(
            plan,
            "set NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT on each, and NPROC_PER_NODE to its "
            "ranks",
        )
    if "dataset" not in keys:
        warnings.append(
            "datasets: LLaMA-Factory takes names from its dataset_info.json: register your data "
            "there and write dataset: NAME."
        )
    if keys["stage"] == "sft":
        warnings.append("chat_template: write template: NAME, one of LLaMA-Factory's.")
    lines = [f"{job.model.name} on {plan.world_size} ranks, {plan.describe()}.",
             f"Run: {command}", *warnings]  # fmt: skip
    return Exported(
        files={file_name: comment(lines) + yaml_text(keys)} | files,
        command=command,
        warnings=tuple(warnings),
    )


def _model_keys(job: Job) -> dict[str, Any]:
    adapter = job.workload.adapter
    keys: dict[str, Any] = {
        "model_name_or_path": job.base_model,
        "do_train": True,
        "stage": "pt" if _plain_text(job) else "sft",
        "finetuning_type": "lora" if adapter else "full",
    }
    if adapter:
        keys |= {
            "lora_rank": adapter.r,
            "lora_alpha": adapter.alpha,
            "lora_dropout": adapter.dropout,
            "lora_target": ",".join(adapter.target_modules),
        }
        if adapter.rslora:
            keys["use_rslora"] = True
        if adapter.dora:
            keys["use_dora"] = True
        if adapter.base_storage:
            double = adapter.base_storage is BaseStorage.NF4_DOUBLE
            keys |= {"quantization_bit": 4, "quantization_method": "bnb",
                     "quantization_type": "nf4", "double_quantization": double}  # fmt: skip
    # LLaMA-Factory recomputes unless told otherwise.
    keys["disable_gradient_checkpointing"] = job.plan.recompute is Recompute.NONE
    return keys


def _plain_text(job: Job) -> bool:
    return bool(job.datasets) and all(source.type == "completion" for source in job.datasets)


def _data_keys(job: Job) -> dict[str, Any]:
    keys: dict[str, Any] = {"cutoff_len": job.workload.seq_len, "packing": job.workload.packing}
    if job.workload.packing and not _plain_text(job):
        keys["neat_packing"] = True  # attention inside each document
    if job.train.val_set_size:
        keys["val_size"] = job.train.val_set_size
    if job.data.train_on_inputs:
        keys["train_on_prompt"] = True
    return keys


def _train_keys(job: Job) -> dict[str, Any]:
    plan, train, workload = job.plan, job.train, job.workload
    beta1, beta2 = train.adam_betas
    keys: dict[str, Any] = {
        "per_device_train_batch_size": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.grad_accum_steps,
        "bf16": workload.precision is Precision.BF16,
        "optim": OPTIMIZER_NAMES[workload.optimizer],
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": train.lr_scheduler,
        "warmup_steps": train.warmup_steps if train.warmup_ratio is None else None,
        "warmup_ratio": train.warmup_ratio,
        "weight_decay": train.weight_decay,
        "adam_beta1": beta1,
        "adam_beta2": beta2,
        "adam_epsilon": train.adam_epsilon,
        "max_grad_norm": train.max_grad_norm,
        "num_train_epochs": train.num_epochs,
        "max_steps": train.max_steps,
        "logging_steps": train.logging_steps,
        "eval_strategy": "steps" if train.eval_steps else None,
        "eval_steps": train.eval_steps,
        "per_device_eval_batch_size": train.eval_batch_size,
        "save_strategy": "steps" if train.save_steps else "no",
        "save_steps": train.save_steps,
        "save_total_limit": train.save_total_limit,
        "torch_compile": train.torch_compile or None,
        "use_cpu": job.device == "cpu" or None,
        "output_dir": job.output_dir,
        "seed": job.seed,
    }
    return {key: value for key, value in keys.items() if value is not None}


def _unsaid(job: Job) -> dict[str, Any]:
    return training_keys(job, _SAID)
