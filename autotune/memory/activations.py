"""What the forward pass saves for backward, and the largest tensors of backward itself."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from autotune.memory.layers import FP32, LayerInventory, Regime, compute_bytes, regime_of
from autotune.plan import Plan, Recompute
from autotune.spec.model import ModelSpec
from autotune.spec.workload import Workload

__all__ = ["FP32", "Activations", "Regime", "compute_bytes", "count_activations", "regime_of"]

# Per vocabulary entry and token, from transformers' unfused causal-LM loss in fp32: the logits in
# the compute type and in fp32, and the saved log-softmax, at the end of forward; the saved
# log-softmax, its gradient and the gradient of the logits in backward.
_LOGITS_LOSS_BYTES = 3 * FP32


@dataclass(frozen=True, kw_only=True, slots=True)
class Activations:
    """Bytes on one rank for one micro-batch."""

    layer: int
    """Saved by one decoder layer that is not recomputed; the largest where layers differ."""
    layers: int
    """Saved by all decoder layers when none is recomputed."""
    checkpoint: int
    """Kept of one recomputed layer: its input."""
    head: int
    """Saved by the final norm and the output head, logits left out."""
    mask: int
    """Masks the layers share: of documents and of windows."""
    layer_gradients: int
    """Largest set of activation gradients alive inside one layer's backward."""
    logits_forward: int
    logits_loss: int
    """Largest set of logit-shaped tensors, in the loss's backward."""
    logits_gradient: int
    """Gradient of the logits while the output head's backward runs."""

    def kept(self, num_layers: int, recompute: Recompute) -> int:
        """Bytes held from forward to backward over all layers, logits left out."""
        saved = self.layers if recompute is Recompute.NONE else num_layers * self.checkpoint
        return saved + self.head + self.mask


def count_activations(model: ModelSpec, workload: Workload, plan: Plan) -> Activations:
    """Count saved activations of one micro-batch on one rank."""
    inventory = LayerInventory(model, workload, plan)
    width, tokens = inventory.width, inventory.tokens
    stream = FP32 if inventory.regime is Regime.AUTOCAST else width
    logits = tokens * model.vocab_size
    kinds = inventory.kinds()
    full_tuning = workload.adapter is None
    saved = sum(saved * count for part in kinds for saved, count in part)
    return Activations(
        layer=sum(max(saved for saved, count in part if count) for part in kinds),
        layers=_traced(model, workload, plan) if model.counted else saved,
        checkpoint=tokens * model.hidden_size * stream,
        head=tokens * inventory.norm(model.hidden_size)
        + tokens * model.hidden_size * width * full_tuning,
        mask=inventory.masks(),
        layer_gradients=inventory.gradients(stream),
        logits_forward=logits * (width * (width != FP32) + 2 * FP32),
        logits_loss=logits * _LOGITS_LOSS_BYTES,
        logits_gradient=logits * width,
    )


def _traced(model: ModelSpec, workload: Workload, plan: Plan) -> int:
    """Return what the layers save by the model's trace, where no inventory knows its family."""
    from autotune.memory.profile import features
    from autotune.memory.profiles import activation_profile
    from autotune.memory.setup import trace_key

    whole = replace(plan, recompute=Recompute.NONE)
    profile = activation_profile(model, trace_key(model, workload, whole))
    ends = [profile.kinds[i].forward.end for i in profile.layers]
    size = features(plan.micro_batch_size, workload.seq_len, plan.cp)
    return round(float(size @ np.array(ends).sum(axis=0)))
