"""Liger's kernels by what they allocate and save: Triton cannot run on tensors without values.

Source: liger-kernel 0.8.5, `liger_kernel/ops/{rms_norm,swiglu,rope,fused_linear_cross_entropy}.py`
and `liger_kernel/transformers/`. Each function makes the tensors that Liger's makes, keeps those
it keeps, and computes nothing. Experts stay as they are.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.autograd import Function

_MULTIPROCESSORS = 132
"""Of an H100: partial sums of a norm's weight gradient, one row each."""
# Norms on both sides of a residual: Liger patches these families without writing into the gradient.
_NOT_IN_PLACE = ("Gemma", "Olmo2")


class _RmsNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, in_place: bool) -> torch.Tensor:
        x = x.contiguous()
        scales = torch.empty(x.shape[:-1].numel(), dtype=torch.float32)
        ctx.in_place = in_place
        ctx.save_for_backward(x, weight, scales)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, above: torch.Tensor) -> Any:
        above = above.contiguous()
        _, weight, _ = ctx.saved_tensors
        below = above if ctx.in_place else torch.zeros_like(above)
        if not ctx.needs_input_grad[1]:
            return below, None, None
        partial = torch.empty(_MULTIPROCESSORS, weight.numel(), dtype=torch.float32)
        return below, partial.sum(dim=0).to(weight.dtype), None


class _SwiGlu(Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx: Any, above: torch.Tensor) -> Any:
        above.contiguous()
        return ctx.saved_tensors  # its kernel writes the gradients over what it saved


class _Rope(Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> Any:
        ctx.save_for_backward(cos.contiguous(), sin.contiguous())
        return _turned(q), _turned(k)

    @staticmethod
    def backward(ctx: Any, dq: torch.Tensor, dk: torch.Tensor) -> Any:
        return _turned(dq), _turned(dk), None, None


def _turned(x: torch.Tensor) -> torch.Tensor:
    """Rotate in place, on a copy where token by token is not how it lies."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


class FusedLinearLoss(Function):
    """Head and cross-entropy slice by slice; both gradients are made, and kept, in forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """Allocate what Liger's forward does.

        Args:
            ctx: autograd's.
            hidden: ``[tokens, hidden]``.
            weight: ``[vocab, hidden]``.
            labels: ``[tokens]``.
        """
        tokens, size = hidden.shape
        vocab = weight.shape[0]
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        losses = torch.zeros(tokens, dtype=torch.float32)
        dtype = (
            torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
        )
        # A slice has next_power_of_2(tokens / ceil(vocab / hidden)) tokens: as written here where
        # the number of tokens is a power of 2, less than twice that where not.
        slices = 1 << ((-(-vocab // size)).bit_length() - 1)
        logits = torch.empty(tokens * vocab * dtype.itemsize // slices, dtype=torch.uint8)
        del logits
        kept = [grad_hidden] if grad_weight is None else [grad_hidden, grad_weight]
        ctx.save_for_backward(*kept)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, above: torch.Tensor) -> Any:
        """Hand over what forward made."""
        grad_hidden, *grad_weight = ctx.saved_tensors
        return grad_hidden, grad_weight[0] if grad_weight else None, None


def patch(model: nn.Module) -> None:
    """Put the fused norms and FFNs in the place of a model's own."""
    for module in model.modules():
        name = type(module).__name__
        if name.endswith("RMSNorm") and hasattr(module, "weight"):
            module.forward = _norm_forward(module, in_place=not name.startswith(_NOT_IN_PLACE))
        elif hasattr(module, "down_proj") and isinstance(module.down_proj, nn.Module):
            if hasattr(module, "gate_up_proj"):
                module.forward = _fused_ffn_forward(module)
            elif hasattr(module, "gate_proj"):
                module.forward = _ffn_forward(module)


@contextlib.contextmanager
def patched_rope(layer: nn.Module) -> Iterator[None]:
    """Put the fused rotary embedding in the place of the one in the layer's modeling file."""
    modeling = sys.modules[type(layer).__module__]
    if not hasattr(modeling, "apply_rotary_pos_emb"):
        yield
        return

    def rotate(q: Any, k: Any, cos: Any, sin: Any, *args: Any, **kwargs: Any) -> Any:
        return _Rope.apply(q, k, cos, sin)

    with mock.patch.object(modeling, "apply_rotary_pos_emb", rotate):
        yield


def _norm_forward(module: Any, *, in_place: bool) -> Any:
    return lambda x: _RmsNorm.apply(x, module.weight, in_place)


def _ffn_forward(module: Any) -> Any:
    return lambda x: module.down_proj(_SwiGlu.apply(module.gate_proj(x), module.up_proj(x)))


def _fused_ffn_forward(module: Any) -> Any:
    return lambda x: module.down_proj(_SwiGlu.apply(*module.gate_up_proj(x).chunk(2, dim=-1)))
