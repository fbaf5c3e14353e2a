"""From the model's output to the loss, in the ways `autotune.memory.setup.Loss` names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from autotune.memory.setup import Loss
from autotune.runner.loss import IGNORED_LABEL, token_weighted_loss
from autotune.runner.trace.liger import FusedLinearLoss

_CHUNKS = 8
"""`CEWithChunkedOutputLoss` of torchtune, its default."""

HEAD_IN_THE_LOSS = {Loss.CHUNKED, Loss.FUSED_LINEAR}
"""The model hands on its last hidden states."""

Compute = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def drop_head(model: Any) -> None:
    """Make the output head hand on what it is given."""
    model.get_output_embeddings().forward = lambda hidden: hidden


def loss_of(kind: Loss, model: Any) -> Compute:
    """Return what takes the model's output, the shifted labels and the step's token count."""
    match kind:
        case Loss.PLAIN:
            return lambda logits, labels, tokens: token_weighted_loss(logits, labels, tokens, 1)
        case Loss.TRANSFORMERS:
            return lambda logits, labels, tokens: model.loss_function(
                logits, None, logits.shape[-1], shift_labels=labels
            )
        case Loss.CHUNKED:
            return lambda hidden, labels, tokens: _chunked(model, hidden, labels)
        case Loss.RECOMPUTED:
            return lambda logits, labels, tokens: token_weighted_loss(
                logits, labels, tokens, 1, chunked=True
            )
        case Loss.FUSED_LINEAR:
            return lambda hidden, labels, tokens: _fused_linear(model, hidden, labels)


def _chunked(model: Any, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """All logits in the compute type, fp32 a slice at a time; torchtune, not compiled."""
    weight = model.get_output_embeddings().weight
    tokens = hidden.to(weight.dtype).flatten(0, -2)
    logits = [F.linear(part, weight) for part in tokens.chunk(_CHUNKS)]
    total = torch.zeros(())
    for part, label in zip(logits, labels.flatten().chunk(_CHUNKS), strict=True):
        total = total + F.cross_entropy(
            part.float(), label, ignore_index=IGNORED_LABEL, reduction="sum"
        )
    return total


def _fused_linear(model: Any, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    weight = model.get_output_embeddings().weight
    return FusedLinearLoss.apply(hidden.to(weight.dtype).flatten(0, -2), weight, labels.flatten())
