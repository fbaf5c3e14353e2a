"""The loss every engine shares: fp32 cross-entropy, weighted by valid tokens of the whole step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

IGNORED_LABEL = -100
CHUNKS = 8
"""Slices of the tokens of a chunked loss: Axolotl's and torchtune's number."""


def token_weighted_loss(
    logits: torch.Tensor,
    shift_labels: torch.Tensor,
    step_tokens: torch.Tensor,
    world_size: int,
    *,
    chunked: bool = False,
) -> torch.Tensor:
    """Return this rank's share of the step's mean loss, scaled for engines that average gradients.

    Every engine here (DDP, ZeRO-1/2/3, FSDP2, HSDP) averages gradients over all ranks, sequence-
    parallel ones included, because none of them is told of sequence parallelism; tensor-parallel
    ranks count as one. So with ``loss = sum(local token losses) * world_size / step_tokens`` the
    averaged gradient is exactly that of the mean over all valid tokens of the step, for any split
    of the step into ranks, sequence parts and micro-batches.

    Args:
        logits: ``[batch, local_tokens, vocab]``, any dtype; the loss is computed in fp32.
        shift_labels: ``[batch, local_tokens]``: the token to predict at each position, or -100.
        step_tokens: valid labels of the whole optimizer step, each once.
        world_size: number of ranks that gradients are averaged over.
        chunked: keep no fp32 value of all logits: cross-entropy goes over `CHUNKS` slices of the
            tokens, and backward computes each slice's again.

    Returns:
        A scalar in fp32. Its mean over ranks, summed over micro-steps, is the step's mean loss.
    """
    flat, labels = logits.flatten(0, -2), shift_labels.flatten()
    if not chunked:
        total = _summed(flat, labels)
    else:
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        for part, part_labels in zip(flat.chunk(CHUNKS), labels.chunk(CHUNKS), strict=True):
            total = total + checkpoint(
                _summed, part, part_labels, use_reentrant=False, preserve_rng_state=False
            )
    return total * (world_size / step_tokens.clamp(min=1).float())


def _summed(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED_LABEL, reduction="sum")
