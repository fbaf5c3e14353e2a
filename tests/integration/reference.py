"""The held-out loss by plain transformers on one process: none of the runner's model code."""

from __future__ import annotations

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
            ids = torch.from_numpy(held_out.input_ids[row]).long()
            labels = torch.from_numpy(held_out.shift_labels[row]).long()
            documents = torch.from_numpy(held_out.document_ids[row])
            for document in documents.unique():
                mine = documents == document
                logits = model(input_ids=ids[mine][None], use_cache=False).logits[0]
                loss += float(
                    torch.nn.functional.cross_entropy(
                        logits.double(), labels[mine], ignore_index=-100, reduction="sum"
                    )
                )
                tokens += int((labels[mine] != -100).sum())
    return loss / tokens
