"""Sequence parallelism, registered with transformers as an attention function.

Each rank of a sequence-parallel group holds ``seq_len / cp`` tokens of the same sequences. Under
Ulysses the ranks swap: before attention, tokens against heads (all-to-all), so each rank sees the
whole sequence for ``num_heads / cp`` heads; after it, back again. Jacobs et al., "DeepSpeed
Ulysses", arXiv:2309.14509. accelerate's own DeepSpeed path is not used: on ZeRO-1 and ZeRO-2 it
doubles the gradient, and SP 2 x DP 2 fails in its loss on gloo. Under ring attention all heads
stay and keys and values travel (`autotune.runner.ring`).

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

from autotune.errors import AutotuneError
from autotune.runner.attention import WindowMasks, add_sink, remove_sink
from autotune.runner.ring import LocalDocuments, local_documents, ring_attention

# No "sdpa" in it: transformers would refuse models whose sinks its own SDPA function drops.
ATTENTION_NAME = "autotune"


@dataclass
class AttentionContext:
    """What the attention function must know of the micro-batch under way.

    One a process, because transformers calls attention functions by name, without our state.
    """

    group: dist.ProcessGroup | None = None
    cp: int = 1
    ring: bool = False
    """Keys and values travel, instead of a swap of tokens for heads."""
    heads_k_stride: int = 1
    """Of the ring over packed sequences."""
    documents: list[LocalDocuments] | None = None
    """Of the ring over packed sequences, one entry a sequence."""
    mask: torch.Tensor | None = None
    """``[batch, 1, seq_len, seq_len]`` bool, True = attend; None = plain causal."""
    calls: int = 0
    last_shape: tuple[int, ...] = field(default=())
    """Shape of the queries attention saw: ``[batch, heads / cp, seq_len, head_dim]``, or under the
    ring ``[batch, heads, seq_len / cp, head_dim]``."""
    last_dtype: torch.dtype | None = None
    """What the kernel computed in: its output's, as autocast casts queries inside it."""
    masked_calls: int = 0
    ring_calls: int = 0
    document_calls: int = 0
    """Ring calls that kept documents apart."""
    windows: WindowMasks = field(default_factory=WindowMasks)

    def begin(self, document_ids: torch.Tensor | None) -> None:
        """Take up a micro-batch.

        Args:
            document_ids: ``[batch, seq_len]`` of its whole sequences where they are packed.
        """
        self.mask = self.documents = None
        if document_ids is None:
            return
        if self.ring:
            rank = dist.get_rank(self.group)
            device = document_ids.device
            self.documents = local_documents(document_ids, cp=self.cp, rank=rank, device=device)
        else:
            self.mask = document_mask(document_ids)

    def count_from_zero(self) -> None:
        """Forget the calls counted so far."""
        self.calls = self.masked_calls = self.ring_calls = self.document_calls = 0


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


def make_sequence_groups(cp: int, tp: int = 1) -> dist.ProcessGroup | None:
    """Create the groups of `cp` ranks of a sequence; return this rank's (None when ``cp == 1``).

    Neighbours, because the all-to-all wants the fastest links and ranks are numbered by host; but
    for the `tp` ranks that hold the same tokens, which are nearer still.
    """
    if cp == 1:
        return None
    world, rank = dist.get_world_size(), dist.get_rank()
    own = None
    for block in range(0, world, cp * tp):
        for first in range(block, block + tp):
            members = list(range(first, block + cp * tp, tp))
            group = dist.new_group(members)
            if rank in members:
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
    if context.ring:
        _refuse_in_a_ring(query.shape[2] * context.cp, sliding_window, s_aux, kwargs)
        return _ring(context, query, key, value, kwargs.get("scaling")), None
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


def _ring(
    context: AttentionContext,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
) -> torch.Tensor:
    assert context.group is not None
    context.calls += 1
    context.ring_calls += 1
    context.document_calls += context.documents is not None
    context.last_shape = tuple(query.shape)
    output = ring_attention(
        query,
        key,
        value,
        group=context.group,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        documents=context.documents,
        heads_k_stride=context.heads_k_stride,
    )
    context.last_dtype = output.dtype
    return output


def _refuse_in_a_ring(
    seq_len: int, window: int | None, sinks: torch.Tensor | None, further: dict[str, Any]
) -> None:
    """Raise for what rule AT122 refuses, in models no rule knows."""
    asked = {
        "a sliding window": window is not None and window < seq_len,
        "sinks": sinks is not None,
        "dropout": bool(further.get("dropout")),
        "a soft cap": bool(further.get("softcap")),
    }
    if any(asked.values()):
        named = " and ".join(what for what, given in asked.items() if given)
        raise AutotuneError(f"Ring attention here knows no {named}. Use Ulysses.")


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
