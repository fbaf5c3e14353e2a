"""Projections that multiply in 8-bit floats, by torchao, and the proof that they do.

Each of the three products of a projection (output, gradient of the input, gradient of the weight)
takes both operands in float8: inputs and weights in e4m3, gradients in e5m2, each with one scale
for the whole tensor, taken from the tensor itself (``tensorwise``, torchao's default). Stored
weights, their gradients and the optimizer stay as they are.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from accelerate.utils import AORecipeKwargs
from accelerate.utils.ao import find_first_last_linear_layers
from torch import nn

from autotune.errors import AutotuneError
from autotune.runner.compiling import decoder_layers
from autotune.spec.float8 import STEP
from autotune.spec.workload import Workload


def apply_float8(model: Any, workload: Workload, device: str) -> None:
    """Put float8 projections into a model before an engine wraps it, where it is asked for.

    As accelerate and torchao advise, the first and the last linear layer of the model stay: errors
    there cost most. CPUs have no float8 products; there torchao multiplies the rounded values in
    fp32: the same roundings, slower.

    Raises:
        AutotuneError: torchao is not installed.
    """
    if not workload.fp8 or workload.fp8_all_gather:
        return
    put_in_float8(model, emulate=device == "cpu", on_cpu=device == "cpu")


def put_in_float8(model: Any, *, emulate: bool, on_cpu: bool) -> None:
    """Replace a model's projections; what is traced and what is trained get the same.

    Args:
        model: Not yet wrapped by an engine.
        emulate: Multiply in fp32, for want of float8 products.
        on_cpu: Its tensors are the CPU's, real or not.

    Raises:
        AutotuneError: torchao is not installed.
    """
    torchao = import_torchao()
    chosen = projections(model)
    torchao.convert_to_float8_training(
        model,
        config=torchao.Float8LinearConfig(emulate=emulate),
        module_filter_fn=lambda module, name: name in chosen,
    )
    for name in chosen if on_cpu else ():
        model.get_submodule(name).register_forward_pre_hook(_cast_as_autocast_does)


def gather_in_float8(trainer: Any, workload: Workload, device: str) -> None:
    """Have accelerate put the projections in with FSDP2, where weights are gathered in float8.

    Such weights are a subclass of tensors, whose ``data_ptr`` is 0 while they are not sharded.
    accelerate tells the optimizer's parameters by it, so the optimizer must be made before them:
    otherwise it steps over parameters that are not the model's (accelerate 1.15,
    ``_prepare_fsdp2``). It also has the scales made anew after each optimizer step.

    Raises:
        AutotuneError: torchao is not installed.
    """
    if not workload.fp8_all_gather:
        return
    torchao = import_torchao()
    chosen = projections(trainer.model)
    accelerator = trainer.accelerator
    accelerator.ao_recipe_handler = AORecipeKwargs(
        config=torchao.Float8LinearConfig(
            emulate=device == "cpu", enable_fsdp_float8_all_gather=True
        ),
        module_filter_func=lambda module, name: name in chosen,
    )
    accelerator.has_fp8_handler = True


def import_torchao() -> Any:
    """Return ``torchao.float8``.

    Raises:
        AutotuneError: it is not installed.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # of CUDA libraries that a CPU build cannot load
    try:
        import torchao.float8
    except ImportError as error:
        raise AutotuneError(
            f"fp8 needs torchao ({error}). Install it (pip install torchao), or leave fp8 out."
        ) from None
    finally:
        logging.disable(before)
    return torchao.float8


def projections(model: Any) -> set[str]:
    """Return the names of the linear layers that fp8 is for."""
    ends = find_first_last_linear_layers(model)
    inside = {id(m) for layer in decoder_layers(model) for m in layer.modules()}
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and id(module) in inside
        and name not in ends
        and module.in_features % STEP == 0
        and module.out_features % STEP == 0
    }


def float8_fault(model: Any, workload: Workload, device: str, asked: int) -> tuple[int, str]:
    """Return how many float8 projections a prepared model has, and what is wrong with them.

    Args:
        model: As the engine left it.
        workload: Says what was asked for.
        device: Where it runs.
        asked: How many there should be, by the model's own description.
    """
    from torchao.float8.float8_linear import Float8Linear

    found = {name: m for name, m in model.named_modules() if isinstance(m, Float8Linear)}
    if len(found) != asked:
        return len(found), f"asked for {asked} projections in float8, but {len(found)} are"
    wanted = (device == "cpu", workload.fp8_all_gather)
    for name, module in found.items():
        config = module.config
        if (config.emulate, config.enable_fsdp_float8_all_gather) != wanted:
            return len(found), (
                f"{name}: asked for emulation {wanted[0]} and a float8 gather {wanted[1]}, but "
                f"{config.emulate} and {config.enable_fsdp_float8_all_gather} run"
            )
    return len(found), ""


def _cast_as_autocast_does(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Cast a projection's input, which torchao does under CUDA's autocast alone."""
    if not torch.is_autocast_enabled("cpu"):
        return args
    return tuple(a.to(torch.get_autocast_dtype("cpu")) for a in args)
