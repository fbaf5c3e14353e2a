"""torch's FlashAttention under flash-attn's names against SDPA's mathematics, in bf16 on CUDA."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from autotune.runner import flash_kernels  # noqa: E402

pytestmark = pytest.mark.gpu
F = torch.nn.functional
BOUND = 0.05
"""bf16: seven bits of mantissa, scores of order 1."""


def random(*shape):
    return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")


def expected(q, k, v, dout, mask):
    """Output and gradients in fp32, ``[tokens, heads, dim]`` in and out."""
    whole = [x.float().transpose(0, 1)[None].requires_grad_() for x in (q, k, v)]
    output = F.scaled_dot_product_attention(*whole, attn_mask=mask, scale=0.3, enable_gqa=True)
    output.backward(dout.float().transpose(0, 1)[None])
    return [x[0].transpose(0, 1) for x in (output, *(y.grad for y in whole))]


def differences(made, want):
    return [float((a.float() - b).abs().max()) for a, b in zip(made, want, strict=True)]


@pytest.mark.parametrize("causal", [True, False])
def test_one_length(causal):
    torch.manual_seed(1)
    q, k, v, dout = random(64, 4, 64), random(64, 2, 64), random(64, 2, 64), random(64, 4, 64)
    out, lse, *_ = flash_kernels._flash_attn_forward(q[None], k[None], v[None], 0.0, 0.3, causal)
    assert lse.shape == (1, 4, 64) and lse.dtype is torch.float32
    made = [torch.full_like(x[None], torch.nan) for x in (q, k, v)]
    flash_kernels._flash_attn_backward(
        dout[None], q[None], k[None], v[None], out, lse, *made, 0.0, 0.3, causal
    )
    mask = torch.ones(64, 64, dtype=torch.bool, device="cuda")
    want = expected(q, k, v, dout, mask.tril() if causal else mask)
    assert max(differences([out[0], *(x[0] for x in made)], want)) < BOUND


def test_documents_with_keys_of_earlier_ranks():
    torch.manual_seed(2)
    cu_q, cu_k = (
        torch.tensor(ends, dtype=torch.int32, device="cuda") for ends in ([0, 3, 7], [0, 8, 12])
    )
    q, k, v, dout = random(7, 4, 64), random(12, 2, 64), random(12, 2, 64), random(7, 4, 64)
    out, lse, *_ = flash_kernels._flash_attn_varlen_forward(
        q, k, v, cu_q, cu_k, 4, 8, 0.0, 0.3, True
    )
    made = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    flash_kernels._flash_attn_varlen_backward(
        dout, q, k, v, out, lse, *made, cu_q, cu_k, 4, 8, 0.0, 0.3, True
    )
    mask = torch.zeros(7, 12, dtype=torch.bool, device="cuda")
    mask[:3, :8] = torch.ones(3, 8, dtype=torch.bool, device="cuda").tril(5)
    mask[3:, 8:] = torch.ones(4, 4, dtype=torch.bool, device="cuda").tril()
    assert max(differences([out, *made], expected(q, k, v, dout, mask))) < BOUND
