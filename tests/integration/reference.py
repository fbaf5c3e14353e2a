"""Losses and gradients by plain transformers on one process: none of the runner's model code."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from autotune.resources import cache_dir
from autotune.trial.protocol import Request


def held_out_loss(weights: Path, request: Request, **options: Any) -> float:
    """Return the mean token loss over the request's held-out sequences, in fp32.

    Each document goes through the model alone, so the packed mask is checked, too.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from autotune.runner.data import build_sequences

    model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32, **options).eval()
    held_out = build_sequences(request, cache_dir() / "tokenized").validation
    assert held_out is not None
    loss, tokens = 0.0, 0
    with torch.no_grad():
        for row in range(len(held_out)):
            for summed, count in _document_losses(model, held_out, row):
                loss, tokens = loss + summed.item(), tokens + count
    return loss / tokens


def sgd_steps(
    weights: Path, request: Request, steps: int, learning_rate: float
) -> tuple[list[float], list[float]]:
    """Train by plain SGD; return each step's loss and gradient norm, in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    from autotune.runner.data import build_sequences
    from autotune.runner.data.loader import StepOrder

    model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    train = build_sequences(request, cache_dir() / "tokenized").train
    order = StepOrder(len(train), request.workload.global_batch_size, seed=request.seed)
    losses, norms = [], []
    for step in range(steps):
        parts = [part for row in order.step(step) for part in _document_losses(model, train, row)]
        loss = sum(summed for summed, _ in parts) / sum(count for _, count in parts)
        optimizer.zero_grad()
        loss.backward()
        gradients = [p.grad.flatten() for p in model.parameters()]
        losses.append(loss.item())
        norms.append(torch.cat(gradients).double().norm().item())
        optimizer.step()
    return losses, norms


def _document_losses(model: Any, sequences: Any, row: int) -> Iterator[tuple[Any, int]]:
    """Yield the summed token loss and the number of labels of each document of a sequence."""
    import torch

    laid_out = sequences.rows([row])
    ids = torch.from_numpy(laid_out.input_ids[0]).long()
    labels = torch.from_numpy(laid_out.shift_labels[0]).long()
    documents = torch.from_numpy(laid_out.document_ids[0])
    for document in documents.unique():
        mine = documents == document
        logits = model(input_ids=ids[mine][None], use_cache=False).logits[0]
        summed = torch.nn.functional.cross_entropy(
            logits.double(), labels[mine], ignore_index=-100, reduction="sum"
        )
        yield summed, int((labels[mine] != -100).sum())
