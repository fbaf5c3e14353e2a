"""Attention of other tools, registered with transformers for a trace."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from autotune.errors import AutotuneError
from autotune.memory.setup import Attention
from autotune.runner.ulysses import ATTENTION_NAME

# No "flash" in it: transformers would look for that kernel.
_FLASH, _EAGER = "autotune_traced_fused", "autotune_traced_eager"


def register(kind: Attention) -> str:
    """Make a kind of attention known to transformers; return its name there.

    transformers' own SDPA function allocates what the runner's does, which calls it: without a
    mask where a batch is plain, with one of documents or windows where not.
    """
    match kind:
        case Attention.RUNNER | Attention.SDPA | Attention.RING:
            return ATTENTION_NAME
        case Attention.FLASH:
            name, function = _FLASH, _flash
        case Attention.EAGER:
            name, function = _EAGER, _eager
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, lambda *args, **kwargs: None)
    return name


def _flash(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Save q, k, v, the output and one fp32 number a head and token; no mask for any batch.

    FlashAttention-2 (Dao, arXiv:2307.08691) gets documents as lengths, windows and sinks as such.
    """
    output = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return output.transpose(1, 2).contiguous(), None


def _eager(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    **kwargs: Any,
) -> Any:
    """Call the family's own function with the additive mask that transformers makes."""
    modeling = sys.modules[type(module).__module__]
    function = getattr(modeling, "eager_attention_forward", None)
    if function is None:
        raise AutotuneError(f"{type(module).__name__} has no eager attention to trace.")
    # Made for each layer here, once for all of them there: it is small beside scores of all heads.
    mask = torch.zeros(query.shape[0], 1, query.shape[2], key.shape[2], dtype=query.dtype)
    return function(module, query, key, value, mask, **kwargs)
