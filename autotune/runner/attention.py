"""What some families' attention adds to plain SDPA: sliding windows and sinks.

transformers' own SDPA function takes the window from the mask it is handed and drops the sinks.
The mask here is ours (`ulysses.CONTEXT`), so the window has to be ours as well.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

# SDPA's fused kernels want head dimensions that are multiples of 8.
SINK_PADDING = 8


class WindowMasks:
    """Masks of windowed layers, built once a micro-batch and window and shared by the layers."""

    def __init__(self) -> None:
        self._base: torch.Tensor | None = None
        self._made: dict[tuple[int, int | None, bool], torch.Tensor] = {}

    def mask(
        self,
        base: torch.Tensor | None,
        *,
        seq_len: int,
        window: int | None,
        sink: bool,
        device: torch.device,
    ) -> torch.Tensor | None:
        """Return what a layer must mask; None when plain causal attention says it all.

        Args:
            base: ``[batch, 1, seq_len, seq_len]`` bool, the documents' causal mask; None = causal.
            seq_len: tokens of the whole sequence.
            window: tokens a query sees, itself among them; None = all before it.
            sink: whether `add_sink` put a position in front of queries and keys.
            device: of the queries.

        Returns:
            Bool, True = attend, ``[batch or 1, 1, queries, keys]``.
        """
        if window is not None and window >= seq_len:
            window = None
        if window is None and (base is None or not sink):
            return base
        if base is not self._base:
            self._base, self._made = base, {}
        key = (seq_len, window, sink)
        if key not in self._made:
            self._made[key] = _build(base, seq_len, window, sink, device)
        return self._made[key]


def _build(
    base: torch.Tensor | None, seq_len: int, window: int | None, sink: bool, device: torch.device
) -> torch.Tensor:
    if base is None:
        base = torch.ones(1, 1, seq_len, seq_len, dtype=torch.bool, device=device).tril_()
    if window is not None:
        # Keys at a distance of `window` or more lie below this diagonal.
        base = base.triu(1 - window)
    return F.pad(base, (1, 0, 1, 0), value=True) if sink else base


def add_sink(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Put a position in front whose score is the head's sink and whose value is zero.

    ``softmax([sink, scores])`` without its first column is what gpt-oss's attention computes
    (transformers' `eager_attention_forward` there). One more feature carries the sink: the queries
    hold ``sink / scaling`` in it, the first key holds 1 and the others 0, so the product is exact
    and the sink gets its gradient through the query. A query stands in front as well, so that
    SDPA's causal flag still fits; its output is dropped.

    Args:
        query: ``[batch, heads, seq_len, head_dim]``.
        key: ``[batch, kv_heads, seq_len, head_dim]``.
        value: like `key`.
        sinks: ``[heads]``.
        scaling: what the scores are multiplied with.

    Returns:
        Query, key and value of ``seq_len + 1`` positions and ``head_dim + SINK_PADDING`` features.
    """
    batch, heads, seq_len, _ = query.shape
    column = (sinks.to(query.dtype) / scaling)[None, :, None, None]
    column = F.pad(column.expand(batch, heads, seq_len, 1), (0, SINK_PADDING - 1))
    query = F.pad(torch.cat([query, column], dim=-1), (0, 0, 1, 0))
    key = F.pad(key, (0, SINK_PADDING, 1, 0))
    first = torch.zeros_like(key[:, :, :1])
    first[..., -SINK_PADDING] = 1
    return query, torch.cat([first, key[:, :, 1:]], dim=2), F.pad(value, (0, SINK_PADDING, 1, 0))


def remove_sink(output: torch.Tensor) -> torch.Tensor:
    """Drop the position and the features `add_sink` added from ``[batch, seq, heads, dim]``."""
    return output[:, 1:, :, :-SINK_PADDING]
