"""What accelerate and the engines put around a model: casts, autocast, checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils.operations import convert_outputs_to_fp32
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from autotune.memory.setup import Checkpointing, Regime, TraceKey
from autotune.runner.trace.losses import HEAD_IN_THE_LOSS
from autotune.runner.trace.models import Cut

WEIGHTS = {
    Regime.COMPUTE: torch.bfloat16,
    Regime.FSDP: torch.bfloat16,
    Regime.AUTOCAST: torch.float32,
    Regime.FP32: torch.float32,
}

_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._grouped_mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
}


def wrap(cut: Cut, key: TraceKey) -> list[nn.Module]:
    """Add the casts and checkpoints of a key's engine to a model.

    Returns:
        What a decoder layer is from outside, first to last: the checkpoint's wrapper where the
        engine puts one around it.
    """
    outside: list[nn.Module] = list(cut.layers)
    match key.checkpointing:
        case Checkpointing.NONE:
            pass
        case Checkpointing.SELECTIVE:
            outside = _wrap_layers(cut, context_fn=_selective)
        case Checkpointing.FULL if key.regime is Regime.FSDP:
            # accelerate.utils.fsdp_utils.fsdp2_apply_ac
            outside = _wrap_layers(cut, preserve_rng_state=False)
        case _:
            reentrant = key.checkpointing is Checkpointing.REENTRANT
            cut.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant:
                cut.model.enable_input_require_grads()
    if key.regime is Regime.FSDP:
        _cast_as_fsdp2(cut, has_head=key.loss not in HEAD_IN_THE_LOSS)
    elif key.regime is Regime.AUTOCAST:
        # Accelerator.prepare_model
        forward = torch.autocast("cpu", torch.bfloat16)(cut.model.forward)
        cut.model.forward = convert_outputs_to_fp32(forward)
    return outside


def _wrap_layers(cut: Cut, **options: Any) -> list[nn.Module]:
    for i, layer in enumerate(cut.layers):
        cut.layers[i] = checkpoint_wrapper(layer, **options)
    return list(cut.layers)


def _selective() -> Any:
    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = operator in _KEPT
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def _cast_as_fsdp2(cut: Cut, *, has_head: bool) -> None:
    """Cast at the edges of the units that `fsdp2_prepare_model` of accelerate 1.15 makes.

    Each unit's inputs become the compute type and its outputs fp32 (`FSDPState._pre_forward` and
    `_post_forward` with the runner's policy). Units: each decoder layer (and the checkpoint around
    it, which holds no parameter but casts alike), the embedding, final norm and head each, the
    model itself.
    """
    from accelerate.utils import fsdp_utils

    model = cut.model
    units = [*cut.layers, *(getattr(m, "_checkpoint_wrapped_module", m) for m in cut.layers)]
    units += [model.get_input_embeddings(), fsdp_utils._find_final_norm(model), model]
    if has_head:
        units.append(model.get_output_embeddings())
    for unit in dict.fromkeys(unit for unit in units if unit is not None):
        unit.register_forward_pre_hook(_casting_inputs, prepend=True, with_kwargs=True)
        unit.register_forward_hook(_casting_output)


def _casting_inputs(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return tree_map(_caster(torch.bfloat16), args), tree_map(_caster(torch.bfloat16), kwargs)


def _casting_output(module: nn.Module, args: Any, output: Any) -> Any:
    return tree_map(_caster(torch.float32), output)


def _caster(dtype: torch.dtype) -> Callable[[Any], Any]:
    def cast(value: Any) -> Any:
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(dtype) if floating and value.dtype != dtype else value

    return cast
