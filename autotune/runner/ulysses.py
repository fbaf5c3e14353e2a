"""Sequence parallelism: Ulysses attention registered with transformers as an attention function.

Each rank of a sequence-parallel group holds ``seq_len / cp`` tokens of the same sequences. For
attention the ranks swap: before it, tokens against heads (all-to-all), so each rank sees the whole
sequence for ``num_heads / cp`` heads; after it, back again. Jacobs et al., "DeepSpeed Ulysses",
arXiv:2309.14509. accelerate's own DeepSpeed path is not used: on ZeRO-1 and ZeRO-2 it doubles the
gradient, and SP 2 x DP 2 fails in its loss on gloo.

The same function serves ``cp == 1``, so a trial and a run always take the attention path the plan
asks for: causal without a mask for plain batches, block-diagonal for packed ones. Sliding windows
and sinks are added here (`autotune.runner.attention`), from what the layer hands over.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

from autotune.runner.attention import WindowMasks, add_sink, remove_sink

# No "sdpa" in it: transformers would refuse models whose sinks its own SDPA function drops.
ATTENTION_NAME = "autotune"


@dataclass
class AttentionContext:
    """What the attention function must know of the micro-batch under way.

    One a process, because transformers calls attention functions by name, without our state.
    """

    group: dist.ProcessGroup | None = None
    cp: int = 1
    mask: torch.Tensor | None = None
    """``[batch, 1, seq_len, seq_len]`` bool, True = attend; None = plain causal."""
    calls: int = 0
    last_shape: tuple[int, ...] = field(default=())
    """Shape of the queries the kernel saw: ``[batch, heads / cp, seq_len, head_dim]``."""
    last_dtype: torch.dtype | None = None
    """What the kernel computed in: its output's, as autocast casts queries inside it."""
    masked_calls: int = 0
    windows: WindowMasks = field(default_factory=WindowMasks)


CONTEXT = AttentionContext()


def register_attention() -> None:
    """Make ``attn_implementation="autotune"`` known to transformers."""
    AttentionInterface.register(ATTENTION_NAME, _attention)
    AttentionMaskInterface.register(ATTENTION_NAME, _no_mask_of_their_own)


def keep_attention_uncompiled() -> None:
    """Leave the attention function out of compiled layers, which are then two graphs each.

    It reads and counts in `CONTEXT`, which a graph would take for constants, and its all-to-all
    cannot be traced; its kernel is one fused operator already.
    """
    AttentionInterface.register(ATTENTION_NAME, torch.compiler.disable(_attention))


def make_sequence_groups(cp: int) -> dist.ProcessGroup | None:
    """Create the groups of `cp` neighbouring ranks; return this rank's (None when ``cp == 1``).

    Neighbours, because the all-to-all wants the fastest links and ranks are numbered by host.
    """
    if cp == 1:
        return None
    world, rank = dist.get_world_size(), dist.get_rank()
    own = None
    for first in range(0, world, cp):
        group = dist.new_group(list(range(first, first + cp)))
        if first <= rank < first + cp:
            own = group
    return own


def document_mask(document_ids: torch.Tensor) -> torch.Tensor:
    """Return the causal block-diagonal mask of packed sequences.

    Args:
        document_ids: ``[batch, seq_len]``, equal within a document.

    Returns:
        ``[batch, 1, seq_len, seq_len]`` bool, True where the query (row) may see the key (column).
    """
    same = document_ids[:, :, None] == document_ids[:, None, :]
    return same.tril_().unsqueeze(1)


def _no_mask_of_their_own(*args: Any, **kwargs: Any) -> None:
    """Keep transformers from building a mask of the rank's own tokens; ours is in CONTEXT."""
    return None


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend over the whole sequence.

    Args:
        module: the attention layer.
        query: ``[batch, heads, seq_len / cp, head_dim]``.
        key: ``[batch, kv_heads, seq_len / cp, head_dim]``.
        value: like `key`.
        attention_mask: always None here; `CONTEXT.mask` counts.
        sliding_window: tokens a query sees, itself among them; None = all before it.
        s_aux: ``[heads]``, the sinks of all heads; None without.
        **kwargs: passed on to transformers' SDPA function.

    Returns:
        ``[batch, seq_len / cp, heads, head_dim]`` and no weights.
    """
    context = CONTEXT
    if context.cp > 1:
        query, key, value = (_scatter_heads(x, context) for x in (query, key, value))
    context.calls += 1
    context.last_shape = tuple(query.shape)
    mask = context.windows.mask(
        context.mask,
        seq_len=query.shape[2],
        window=sliding_window,
        sink=s_aux is not None,
        device=query.device,
    )
    context.masked_calls += mask is not None
    if s_aux is not None:
        sinks = s_aux.chunk(context.cp)[dist.get_rank(context.group)] if context.cp > 1 else s_aux
        query, key, value = add_sink(query, key, value, sinks, kwargs["scaling"])
    output, _ = sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    context.last_dtype = output.dtype
    if s_aux is not None:
        output = remove_sink(output)
    if context.cp > 1:
        output = _gather_heads(output.transpose(1, 2), context).transpose(1, 2)
    return output, None


def _scatter_heads(x: torch.Tensor, context: AttentionContext) -> torch.Tensor:
    """``[batch, heads, seq / cp, dim]`` -> ``[batch, heads / cp, seq, dim]``."""
    batch, heads, local, dim = x.shape
    parts = x.reshape(batch, context.cp, heads // context.cp, local, dim).movedim(1, 0)
    received = _AllToAll.apply(parts, context.group)  # [source rank = sequence part, batch, ...]
    return received.permute(1, 2, 0, 3, 4).reshape(
        batch, heads // context.cp, context.cp * local, dim
    )


def _gather_heads(x: torch.Tensor, context: AttentionContext) -> torch.Tensor:
    """``[batch, heads / cp, seq, dim]`` -> ``[batch, heads, seq / cp, dim]``."""
    batch, heads, seq, dim = x.shape
    parts = x.reshape(batch, heads, context.cp, seq // context.cp, dim).movedim(2, 0)
    received = _AllToAll.apply(parts, context.group)  # [source rank = head part, batch, ...]
    return received.movedim(0, 1).reshape(batch, heads * context.cp, seq // context.cp, dim)


class _AllToAll(torch.autograd.Function):
    """Swap the leading dimension over the group; its own transpose, so backward swaps alike."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _all_to_all(x, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _all_to_all(grad, ctx.group), None


def _all_to_all(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    x = x.contiguous()
    output = torch.empty_like(x)
    dist.all_to_all_single(output, x, group=group)
    return output
