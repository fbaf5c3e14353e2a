"""Ring attention: each rank keeps its queries, keys and values travel (arXiv:2310.01889).

Two ways, named as Axolotl's ``ring_attn_func`` names them, both of the package ring-flash-attn:

- ``batch_ring`` for plain sequences: blocks of keys and values go around the ring in ``cp - 1``
  hops, each rank attends to the block it holds and merges by the log-sum-exp.
- ``varlen_llama3`` for packed ones: keys and values of ``heads_k_stride`` heads at a time are
  gathered from all ranks (Llama 3's way, arXiv:2407.21783, 3.3.2), and each document attends to
  itself.

The backward of ``batch_ring`` is written here, over the package's communication and kernels. That
of ring-flash-attn 0.1.8 (`ring_flash_attn_backward`) is right in bf16 alone: it returns ``dq`` as
bf16 whatever the queries are, and its sums start as ``buffer.to(float32)``, which in fp32 is the
buffer itself, so the next block's gradient overwrites the sum, and the part on its way to the
next rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from autotune.runner.ring_package import RingPackage, load_ring_package

BATCH_RING = "batch_ring"
VARLEN_LLAMA3 = "varlen_llama3"


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalDocuments:
    """Where the documents of one packed sequence lie, for this rank's part of it."""

    cu_seqlens_q: torch.Tensor
    """Starts of the documents among the rank's queries, and their end; int32."""
    cu_seqlens_k: torch.Tensor
    """The same among the keys those queries see."""
    max_seqlen_q: int
    max_seqlen_k: int
    local_k_slice: slice
    """The keys those queries see, among all of the sequence's."""


def local_documents(
    document_ids: torch.Tensor, *, cp: int, rank: int, device: torch.device
) -> list[LocalDocuments]:
    """Return the documents of each packed sequence as this rank sees them.

    Args:
        document_ids: ``[batch, seq_len]`` of the whole sequences, equal within a document.
        cp: ranks of a sequence.
        rank: this one's place among them.
        device: where attention runs.
    """
    prepare = load_ring_package(device.type).llama3.llama3_flash_attn_prepare_cu_seqlens
    rows = []
    for ids in document_ids.cpu():  # on the host: the package asks for single numbers
        inner = torch.nonzero(ids[1:] != ids[:-1]).flatten() + 1
        ends = torch.cat([inner.new_zeros(1), inner, inner.new_tensor([len(ids)])])
        starts_q, starts_k, most_q, most_k, keys = prepare(ends.to(torch.int32), True, rank, cp)
        rows.append(
            LocalDocuments(
                cu_seqlens_q=starts_q.to(device),
                cu_seqlens_k=starts_k.to(device),
                max_seqlen_q=most_q,
                max_seqlen_k=most_k,
                local_k_slice=keys,
            )
        )
    return rows


def ring_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    group: dist.ProcessGroup,
    scaling: float,
    documents: list[LocalDocuments] | None,
    heads_k_stride: int,
) -> torch.Tensor:
    """Attend causally over the whole sequence, of which this rank holds one part.

    Args:
        query: ``[batch, heads, seq_len / cp, head_dim]``.
        key: ``[batch, kv_heads, seq_len / cp, head_dim]``.
        value: like `key`.
        group: the sequence's ranks, in the order of its parts.
        scaling: what the scores are multiplied with.
        documents: of each packed sequence; None: one document a sequence.
        heads_k_stride: key-value heads gathered at a time, for packed sequences.

    Returns:
        ``[batch, seq_len / cp, heads, head_dim]``.
    """
    package = load_ring_package(query.device.type)
    query, key, value = (x.transpose(1, 2) for x in _autocast(query, key, value))
    if documents is None:
        output: torch.Tensor = _BatchRing.apply(
            query, key.contiguous(), value.contiguous(), scaling, group, package
        )
        return output
    rows = [
        package.llama3.llama3_flash_attn_varlen_func(
            query[row],
            key[row],
            value[row],
            cu_seqlens_q=places.cu_seqlens_q,
            cu_seqlens_k=places.cu_seqlens_k,
            max_seqlen_q=places.max_seqlen_q,
            max_seqlen_k=places.max_seqlen_k,
            heads_k_stride=heads_k_stride,
            local_k_slice=places.local_k_slice,
            softmax_scale=scaling,
            causal=True,
            group=group,
        )
        for row, places in enumerate(documents)
    ]
    return torch.stack(rows)


def _autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cast as autocast casts the inputs of SDPA; it does not know these kernels."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(kind)) for x in tensors)


class _BatchRing(torch.autograd.Function):
    """The package's forward; the backward of this module."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scaling: float,
        group: dist.ProcessGroup,
        package: RingPackage,
    ) -> torch.Tensor:
        output, lse = package.ring.ring_flash_attn_forward(
            group, q, k, v, softmax_scale=scaling, causal=True
        )
        ctx.save_for_backward(q, k, v, output, lse.contiguous())
        ctx.scaling, ctx.group, ctx.package = scaling, group, package
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, output, lse = ctx.saved_tensors
        gradients = _ring_backward(
            ctx.package, ctx.group, grad, q, k, v, output, lse, scaling=ctx.scaling
        )
        return *gradients, None, None, None


def _ring_backward(
    package: RingPackage,
    group: dist.ProcessGroup,
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    *,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of q, k, v.

    Keys and values go around once more, and the fp32 sums of their gradients follow one hop
    behind: after ``cp`` hops a block's sum is home.
    """
    blocks, sums = package.utils.RingComm(group), package.utils.RingComm(group)
    size, rank = blocks.world_size, blocks.rank
    block_q, block_k, block_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device)
                                 for x in (q, k, v))  # fmt: skip
    sum_q = sum_k = sum_v = next_k = next_v = coming_k = coming_v = grad
    for step in range(size):
        last = step + 1 == size
        if not last:
            next_k, next_v = blocks.send_recv_kv(k, v)
        seen = step <= rank  # later parts of the sequence are in the future
        if seen:
            _block_backward(
                package, grad, q, k, v, output, lse, (block_q, block_k, block_v),
                scaling=scaling, causal=step == 0,
            )  # fmt: skip
        if step == 0:
            # Copies in fp32 too: the buffers are written again while the sums travel.
            sum_q, sum_k, sum_v = (
                x.to(torch.float32, copy=True) for x in (block_q, block_k, block_v)
            )
        else:
            sums.wait()
            sum_k, sum_v = coming_k, coming_v
            if seen:
                sum_q += block_q
                sum_k += block_k
                sum_v += block_v
        if not last:
            blocks.wait()
            k, v = next_k, next_v
        coming_k, coming_v = sums.send_recv_kv(sum_k, sum_v)
    sums.wait()
    return sum_q.to(q.dtype), coming_k.to(k.dtype), coming_v.to(v.dtype)


def _block_backward(
    package: RingPackage,
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    buffers: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    *,
    scaling: float,
    causal: bool,
) -> None:
    """Write one block's part of the gradients into `buffers`."""
    kernel = package.ring._flash_attn_backward
    # flash-attn's versions differ in further arguments; the package knows their defaults.
    arguments = package.utils.get_default_args(kernel) | {
        "dout": grad, "q": q, "k": k, "v": v, "out": output, "softmax_lse": lse,
        "dq": buffers[0], "dk": buffers[1], "dv": buffers[2],
        "dropout_p": 0.0, "softmax_scale": scaling, "causal": causal,
        "alibi_slopes": None, "deterministic": False,
    }  # fmt: skip
    window = (
        {"window_size": (-1, -1)}
        if "window_size" in arguments
        else {"window_size_left": -1, "window_size_right": -1}
    )
    kernel(**(arguments | window))
