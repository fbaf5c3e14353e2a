"""flash-attn's low-level functions on torch's own flash kernels, for machines without flash-attn.

ring-flash-attn calls four functions of `flash_attn.flash_attn_interface` (2.x). These have their
names, arguments and layouts, without dropout, windows, soft caps and ALiBi, which the ring here
never asks for. torch ships FlashAttention 2 itself (``aten._flash_attention_forward`` on CUDA) and
a blocked kernel of the same contract on the CPU.

Layouts: queries, keys, values and outputs ``[batch, seq, heads, head_dim]``, or
``[tokens, heads, head_dim]`` where documents of other lengths lie one after another; the
log-sum-exp of the scores, natural logarithm, fp32, ``[batch, heads, seq]`` or ``[heads, tokens]``.
Key-value heads may be fewer than heads. Causal with fewer queries than keys means that the last
query sees the last key, as FlashAttention 2.1 and later do.

On the CPU documents are computed in fp32. In bf16 oneDNN compiles a kernel for every length it
meets and keeps it, so a process would grow as long as it meets new lengths.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

aten = torch.ops.aten
_Pair = tuple[torch.Tensor, torch.Tensor]
_Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _flash_attn_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    alibi_slopes: torch.Tensor | None = None,
    return_softmax: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, None, None]:
    """Return output and log-sum-exp of sequences of one length."""
    _refuse(dropout_p, window_size_left, window_size_right, alibi_slopes)
    if q.device.type == "cpu":
        output, lse = _cpu_forward(q, k, v, softmax_scale, causal)
    else:
        output, lse, *_ = aten._flash_attention_forward(
            q, k, v, None, None, q.shape[1], k.shape[1], 0.0, causal, False, scale=softmax_scale
        )
    return output, lse, None, None


def _flash_attn_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
) -> None:
    """Write the gradients into `dq`, `dk` and `dv`.

    `out` and `softmax_lse` may be those of all keys while `k` and `v` are some of them: the
    gradients are then those keys' part, which is what a ring adds up.
    """
    _refuse(dropout_p, window_size_left, window_size_right, alibi_slopes)
    if q.device.type == "cpu":
        made = _cpu_backward(dout, q, k, v, out, softmax_lse, softmax_scale, causal)
    else:
        made = aten._flash_attention_backward(
            dout, q, k, v, out, softmax_lse, None, None, q.shape[1], k.shape[1], 0.0, causal,
            *_no_random_state(q), scale=softmax_scale,
        )  # fmt: skip
    for buffer, gradient in zip((dq, dk, dv), made, strict=True):
        buffer.copy_(gradient)


def _flash_attn_varlen_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    alibi_slopes: torch.Tensor | None = None,
    return_softmax: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, None, None]:
    """Return output and log-sum-exp of documents that lie one after another."""
    _refuse(dropout_p, window_size_left, window_size_right, alibi_slopes)
    if q.device.type != "cpu":
        output, lse, *_ = aten._flash_attention_forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, causal, False,
            scale=softmax_scale,
        )  # fmt: skip
        return output, lse, None, None
    output = torch.empty_like(q)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32)
    for queries, keys in _documents(cu_seqlens_q, cu_seqlens_k):
        whole, whole_lse = None, None
        for part, is_causal in _parts(queries, keys, causal):
            made, made_lse = _cpu_forward(
                q[None, queries].float(),
                k[None, part].float(),
                v[None, part].float(),
                softmax_scale,
                is_causal,
            )
            if whole is None or whole_lse is None:
                whole, whole_lse = made, made_lse
            else:
                whole, whole_lse = _merged(whole, whole_lse, made, made_lse)
        assert whole is not None and whole_lse is not None
        output[queries], lse[:, queries] = whole[0], whole_lse[0]
    return output, lse, None, None


def _flash_attn_varlen_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
) -> None:
    """Write the gradients of `_flash_attn_varlen_forward` into `dq`, `dk` and `dv`."""
    _refuse(dropout_p, window_size_left, window_size_right, alibi_slopes)
    if q.device.type != "cpu":
        made = aten._flash_attention_backward(
            dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
            max_seqlen_k, 0.0, causal, *_no_random_state(q), scale=softmax_scale,
        )  # fmt: skip
        for buffer, gradient in zip((dq, dk, dv), made, strict=True):
            buffer.copy_(gradient)
        return
    for queries, keys in _documents(cu_seqlens_q, cu_seqlens_k):
        own_dout, own_q, own_out = (x[None, queries].float() for x in (dout, q, out))
        own_dq = torch.zeros_like(own_q)
        for part, is_causal in _parts(queries, keys, causal):
            made_q, made_k, made_v = _cpu_backward(
                own_dout, own_q, k[None, part].float(), v[None, part].float(), own_out,
                softmax_lse[None, :, queries], softmax_scale, is_causal,
            )  # fmt: skip
            own_dq += made_q
            dk[part], dv[part] = made_k[0], made_v[0]
        dq[queries] = own_dq[0]


def _cpu_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool
) -> _Pair:
    """``[batch, seq, heads, dim]`` in and out; the kernel takes heads first, and fewer of k, v."""
    output, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 0.0, causal, scale=scale
    )
    return output.transpose(1, 2), lse


def _cpu_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    causal: bool,
) -> _Triple:
    heads_first = (x.transpose(1, 2) for x in (dout, q, k, v, out))
    made = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *heads_first, lse, 0.0, causal, scale=scale
    )
    dq, dk, dv = (gradient.transpose(1, 2) for gradient in made)
    return dq, dk, dv


def _documents(cu_q: torch.Tensor, cu_k: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield the queries and the keys of each document."""
    ends_q, ends_k = cu_q.tolist(), cu_k.tolist()
    for number in range(len(ends_q) - 1):
        yield (
            slice(ends_q[number], ends_q[number + 1]),
            slice(ends_k[number], ends_k[number + 1]),
        )


def _parts(queries: slice, keys: slice, causal: bool) -> Iterator[tuple[slice, bool]]:
    """Yield the keys a kernel call sees, and whether it is causal.

    The CPU's kernel lets the first query see the first key alone. So the keys before the queries'
    own are a call of their own, in which every query sees every key.
    """
    own = keys.stop - (queries.stop - queries.start)
    if not causal:
        yield keys, False
        return
    yield slice(own, keys.stop), True
    if own > keys.start:
        yield slice(keys.start, own), False


def _merged(
    one: torch.Tensor, one_lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor
) -> _Pair:
    """Combine the outputs of the same queries over two sets of keys."""
    lse = torch.logaddexp(one_lse, other_lse)
    shares = (torch.exp(part - lse).transpose(1, 2).unsqueeze(-1) for part in (one_lse, other_lse))
    merged = sum(output.float() * share for output, share in zip((one, other), shares, strict=True))
    assert isinstance(merged, torch.Tensor)
    return merged.to(one.dtype), lse


def _no_random_state(q: torch.Tensor) -> _Pair:
    """The state of a dropout that drops nothing."""
    return (
        torch.zeros(2, dtype=torch.uint64, device=q.device),
        torch.empty(0, dtype=torch.uint64, device=q.device),
    )


def _refuse(dropout_p: float, left: int, right: int, alibi_slopes: Any) -> None:
    if dropout_p or left >= 0 or right >= 0 or alibi_slopes is not None:
        raise ValueError("these kernels know no dropout, no window and no ALiBi")
