"""After prepare: do the adapter's base, the kernels and the optimizer run as asked for?"""

from __future__ import annotations

from typing import Any

from torch import nn

from autotune.plan import Engine
from autotune.runner.compiling import decoder_layers
from autotune.runner.float8 import float8_fault
from autotune.runner.liger import missing_kernels
from autotune.runner.quantised import count_quantised
from autotune.runner.trainer import AutotuneTrainer
from autotune.spec.float8 import num_float8_projections
from autotune.spec.model import model_from_config
from autotune.training_rules import EIGHT_BIT
from autotune.trial.protocol import Request


def training_faults(trainer: AutotuneTrainer, request: Request) -> tuple[dict[str, Any], str]:
    """Return what was found, and what differs from what was asked for; empty where nothing does."""
    found: dict[str, Any] = {}
    workload = request.workload
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    if trainer.plan.engine is not Engine.DEEPSPEED:  # which steps over masters of its own
        left = left_behind(trainer.optimizer, model)
        if left:
            return found, (
                f"{len(left)} parameters are to be trained, but the optimizer does not step over "
                f"them ({', '.join(left[:3])})"
            )
    if workload.adapter is not None and workload.adapter.base_storage is not None:
        found["layers_in_4bit"] = count_quantised(model)
        whole = _whole_linears(model)
        if whole or not found["layers_in_4bit"]:
            return found, (
                f"asked for a base in 4 bits, but {found['layers_in_4bit']} layers are and "
                f"{', '.join(whole[:3]) or 'no other'} are not"
            )
    if workload.liger:
        missing = missing_kernels(model, workload.liger)
        if missing:
            return found, f"asked for Liger's {', '.join(missing)}, but the model's own code runs"
        found["liger"] = [str(kernel) for kernel in workload.liger]
    if workload.fp8:
        asked = num_float8_projections(model_from_config(request.model.name, request.model.config))
        found["float8_projections"], fault = float8_fault(model, workload, request.device, asked)
        if fault:
            return found, fault
    if workload.optimizer in EIGHT_BIT:
        runs = optimizer_running(trainer)
        found["optimizer"] = runs
        if runs != workload.optimizer:
            return found, f"optimizer: asked for {workload.optimizer}, but {runs} runs"
    return found, ""


def optimizer_running(trainer: AutotuneTrainer) -> str:
    """Return the innermost optimizer under its name in `Workload`, or its class's name."""
    inner: Any = trainer.optimizer
    if trainer.plan.engine is Engine.DEEPSPEED:
        inner = trainer.model_wrapped.optimizer
    while hasattr(inner, "optimizer"):
        inner = inner.optimizer
    told = getattr(inner, "args", None)
    bits = getattr(told, "optim_bits", 32)
    if type(inner).__module__.startswith("bitsandbytes") and bits == 8:
        return "paged_adamw_8bit" if inner.is_paged else "adamw_8bit"
    return type(inner).__name__


def left_behind(optimizer: Any, model: nn.Module) -> list[str]:
    """Return the trained parameters of a prepared model that its optimizer does not step over."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in held]


def _whole_linears(model: nn.Module) -> list[str]:
    """Return the linear layers of the base, inside decoder layers, that hold whole weights."""
    return [
        name
        for layer in decoder_layers(model)
        for name, module in layer.named_modules()
        if type(module) is nn.Linear and "lora_" not in name
    ]
