"""torch.compile, decoder layer by decoder layer, and the proof that it happened."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from transformers import PreTrainedModel

from autotune.runner.ulysses import keep_attention_uncompiled


def compile_layers(model: PreTrainedModel) -> None:
    """Have every decoder layer compiled by inductor at its first call, in place.

    Layer by layer, because accelerate's way traces the model as one, which takes longer with every
    layer, and wraps it. A layer compiled once serves its siblings; in place, engines, checks and
    checkpoints see the model they know. Call it after recomputation was switched on.
    """
    keep_attention_uncompiled()
    # Past its limit of variants of one function, dynamo would go on uncompiled without a word.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for layer in decoder_layers(model):
        if getattr(layer, "gradient_checkpointing", False):
            # transformers recomputes inside `forward`, and dynamo passes over a checkpoint that
            # holds uncompiled attention, in silence. So what is recomputed is compiled.
            layer._gradient_checkpointing_func = _CompiledInside(layer._gradient_checkpointing_func)
        else:
            layer.compile()


def decoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the layers of a model, under the names `fully_shard` and PEFT leave them, too."""
    names = getattr(model, "_no_split_modules", None) or ()
    return [m for m in model.modules() if type(m).__name__.removeprefix("FSDP") in names]


def count_compiled_layers(model: torch.nn.Module) -> int:
    """Return how many decoder layers were set to be compiled."""
    return sum(
        layer._compiled_call_impl is not None
        or isinstance(getattr(layer, "_gradient_checkpointing_func", None), _CompiledInside)
        for layer in decoder_layers(model)
    )


def count_graphs() -> int:
    """Return how many graphs were compiled in this process."""
    from torch._dynamo.utils import counters  # slow to import

    return int(counters["aot_autograd"]["ok"])


class _CompiledInside:
    """A checkpointing function that compiles what it is given."""

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self._checkpoint = checkpoint

    def __call__(self, forward: partial[Any], *args: Any) -> Any:
        compiled = _compiled(forward.func)
        return self._checkpoint(partial(compiled, *forward.args, **forward.keywords), *args)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the one compiled form of a class's `forward`."""
    return torch.compile(function)
