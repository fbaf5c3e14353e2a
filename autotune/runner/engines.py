"""A plan as the `TrainingArguments` that make transformers and accelerate run it."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from transformers import PreTrainedModel, Trainer, TrainingArguments

from autotune.emit.deepspeed import deepspeed_config
from autotune.plan import Engine, Plan, Recompute
from autotune.runner.cpu_shim import install_cpu_fsdp_shim
from autotune.runner.tensor_parallel import SplitMesh
from autotune.spec.model import model_from_config
from autotune.spec.training import TrainSettings
from autotune.spec.workload import Precision
from autotune.trial.protocol import Request


def start_process_group(request: Request, plan: Plan) -> None:
    """Start the default process group: NCCL (and gloo for host tensors) on CUDA, gloo on CPU.

    It must exist before `TrainingArguments` is built: accelerate and DeepSpeed then take it over.
    """
    if request.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cuda:nccl,cpu:gloo")
    elif plan.engine is Engine.DEEPSPEED:
        import deepspeed

        deepspeed.init_distributed("gloo")
    else:
        dist.init_process_group("gloo")
    if plan.engine is Engine.FSDP2:
        os.environ["ACCELERATE_USE_FSDP"] = "true"
        os.environ["FSDP_VERSION"] = "2"
        if request.device == "cpu":
            install_cpu_fsdp_shim()


def training_arguments(
    request: Request, plan: Plan, settings: TrainSettings, **more: Any
) -> TrainingArguments:
    """Return the arguments for a plan, with everything a comparison depends on set explicitly.

    Args:
        request: workload, device, seed, folder.
        plan: what to run.
        settings: optimizer and schedule.
        **more: further `TrainingArguments`, such as the number of steps.
    """
    bf16 = request.workload.precision is Precision.BF16
    values: dict[str, Any] = {
        "output_dir": request.out_dir,
        "per_device_train_batch_size": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.grad_accum_steps,
        "bf16": bf16,
        "use_cpu": request.device == "cpu",
        "optim": _optimizer_name(request, plan),
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.lr_scheduler,
        "warmup_steps": settings.warmup_steps,
        "weight_decay": settings.weight_decay,
        "adam_beta1": settings.adam_betas[0],
        "adam_beta2": settings.adam_betas[1],
        "adam_epsilon": settings.adam_epsilon,
        "max_grad_norm": settings.max_grad_norm,
        "seed": request.seed,
        "remove_unused_columns": False,
        "average_tokens_across_devices": False,
        "ddp_find_unused_parameters": False,
        "logging_nan_inf_filter": False,
        # Our loader starts at the resumed step by itself; see loader.RankLoader.
        "ignore_data_skip": True,
        "disable_tqdm": True,
        "report_to": [],
        "log_level": "warning",
    }
    if plan.engine is Engine.DEEPSPEED:
        values["deepspeed"] = deepspeed_config(
            plan,
            model_from_config(request.model.name, request.model.config),
            request.workload,
            device=request.device,
            max_grad_norm=settings.max_grad_norm,
        )
    elif plan.engine is Engine.FSDP2:
        values["fsdp"] = True
        values["fsdp_config"] = _fsdp_config(request, plan)
        if plan.world_size > 1 and _accelerate_shards(request):
            mesh = SplitMesh if plan.tp > 1 else ParallelismConfig
            # To accelerate, sequence-parallel ranks are ordinary shard ranks.
            values["parallelism_config"] = mesh(
                dp_replicate_size=plan.dp_replicate,
                dp_shard_size=plan.shard_size,
                tp_size=plan.tp,
            )
    return TrainingArguments(**(values | more))


def apply_numerics(trainer: Trainer, request: Request, plan: Plan) -> None:
    """Set FSDP2's policies, which `TrainingArguments` cannot say; call before `train()`.

    accelerate's own bf16 policy reduces gradients and returns the loss in bf16.
    """
    if plan.engine is not Engine.FSDP2:
        return
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is None:  # no FSDP after all: the checks after prepare say what runs instead
        return
    if request.workload.precision is Precision.BF16:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32
        )
    if plan.offload_params:
        plugin.cpu_offload = CPUOffloadPolicy(pin_memory=request.device == "cuda")


def enable_recompute(model: PreTrainedModel, plan: Plan) -> None:
    """Switch recomputation on, where the engine does not do it itself (FSDP2 does)."""
    if plan.recompute is Recompute.FULL and plan.engine is not Engine.FSDP2:
        # ZeRO-3's released parameters have size 0: the non-reentrant check takes that for a change.
        reentrant = plan.zero_stage == 3
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()


def _accelerate_shards(request: Request) -> bool:
    """Say whether accelerate is about to shard; on CPU ranks without the shim it is not.

    There it would refuse a mesh without saying what runs instead. Left without one it runs DDP, and
    the checks after prepare name that.
    """
    kind = PartialState(cpu=request.device == "cpu").distributed_type
    return kind is not DistributedType.MULTI_CPU


_OPTIM_NAMES = {
    "sgd": "sgd",
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}


def _optimizer_name(request: Request, plan: Plan) -> str:
    name = request.workload.optimizer
    if name != "adamw":
        return _OPTIM_NAMES[name]
    if plan.engine is Engine.DEEPSPEED or request.device == "cpu" or plan.offload_params:
        return "adamw_torch"
    return "adamw_torch_fused"


def _fsdp_config(request: Request, plan: Plan) -> dict[str, Any]:
    adapter = request.workload.adapter
    return {
        "version": 2,
        "reshard_after_forward": plan.reshard_after_forward,
        "cpu_offload": plan.offload_params,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "state_dict_type": "SHARDED_STATE_DICT",
        # Rank 0 alone holds the weights; the others' pages stay untouched until the broadcast. A
        # base in 4 bits every rank makes for itself (autotune.runner.quantised), and its part of a
        # split model it cuts from a copy of its own (autotune.runner.tensor_parallel).
        # accelerate cannot broadcast weights that are cast before they are gathered.
        "cpu_ram_efficient_loading": plan.tp == 1
        and not (adapter and adapter.base_storage)
        and not request.workload.fp8_all_gather,
        "activation_checkpointing": plan.recompute is Recompute.FULL,
    }
