"""What the forward pass saves for backward, counted tensor by tensor.

The inventory follows transformers 5 (modeling_llama.py, modeling_qwen3.py: RMSNorm that computes in
fp32, rotary embedding, SDPA, SwiGLU) and PyTorch's autograd formulas. A test compares it with the
bytes that `torch.autograd.graph.saved_tensors_hooks` sees in the real model.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from autotune.plan import Engine, Plan, Recompute
from autotune.spec.model import ModelSpec
from autotune.spec.workload import Precision, Workload

FP32 = 4

# Per vocabulary entry and token, from transformers' unfused causal-LM loss in fp32: the logits in
# the compute type and in fp32, and the saved log-softmax, at the end of forward; the saved
# log-softmax, its gradient and the gradient of the logits in backward.
_LOGITS_LOSS_BYTES = 3 * FP32


class Regime(StrEnum):
    """Which types the forward pass sees."""

    COMPUTE = "compute"
    """Weights and hidden states in the compute type: DeepSpeed and FSDP2 in bf16."""
    AUTOCAST = "autocast"
    """fp32 weights and hidden states, matrix products in bf16: DDP in bf16."""
    FP32 = "fp32"


def regime_of(plan: Plan, precision: Precision) -> Regime:
    """Return the regime an engine runs a precision in."""
    if precision is Precision.FP32:
        return Regime.FP32
    return Regime.AUTOCAST if plan.engine is Engine.DDP else Regime.COMPUTE


def compute_bytes(precision: Precision) -> int:
    """Return the size of one element of the matrix products."""
    return FP32 if precision is Precision.FP32 else 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Activations:
    """Bytes on one rank for one micro-batch."""

    layer: int
    """Saved by one decoder layer that is not recomputed."""
    checkpoint: int
    """Kept of one recomputed layer: its input."""
    head: int
    """Saved by the final norm and the output head, logits left out."""
    mask: int
    """Document mask of packed batches, shared by all layers."""
    layer_gradients: int
    """Largest set of activation gradients alive inside one layer's backward."""
    logits_forward: int
    logits_loss: int
    """Largest set of logit-shaped tensors, in the loss's backward."""
    logits_gradient: int
    """Gradient of the logits while the output head's backward runs."""

    def kept(self, num_layers: int, recompute: Recompute) -> int:
        """Bytes held from forward to backward over all layers, logits left out."""
        each = self.layer if recompute is Recompute.NONE else self.checkpoint
        return num_layers * each + self.head + self.mask


def count_activations(model: ModelSpec, workload: Workload, plan: Plan) -> Activations:
    """Count saved activations of one micro-batch on one rank."""
    regime = regime_of(plan, workload.precision)
    width = compute_bytes(workload.precision)
    stream = FP32 if regime is Regime.AUTOCAST else width
    tokens = plan.micro_batch_size * workload.seq_len // plan.cp
    logits = tokens * model.vocab_size
    layer = tokens * _layer_bytes_per_token(model, workload, plan, regime)
    # The mask spans the whole sequence on every sequence-parallel rank.
    mask_elements = plan.micro_batch_size * workload.seq_len**2 if workload.packing else 0
    # SDPA turns the boolean mask into the compute type, once a layer, and saves that.
    layer += mask_elements * width
    # FSDP2 hands its layers' outputs on in fp32 (output_dtype), and recompute keeps those.
    checkpoint = FP32 if plan.engine is Engine.FSDP2 else stream
    full_tuning = workload.adapter is None
    return Activations(
        layer=layer,
        checkpoint=tokens * model.hidden_size * checkpoint,
        head=tokens * _norm_bytes_per_token(model.hidden_size, regime, full_tuning)
        + tokens * model.hidden_size * width * full_tuning,
        mask=mask_elements,
        layer_gradients=tokens * (3 * model.ffn_size * width + 2 * model.hidden_size * stream),
        logits_forward=logits * (width * (width != FP32) + 2 * FP32),
        logits_loss=logits * _LOGITS_LOSS_BYTES,
        logits_gradient=logits * width,
    )


def _norm_bytes_per_token(size: int, regime: Regime, trainable: bool) -> int:
    """RMSNorm: its input in fp32 (pow and mul share it) and, for the weight, the normalised one."""
    normalised = 2 if regime is Regime.COMPUTE else FP32
    return size * (FP32 + normalised * trainable)


def _layer_bytes_per_token(model: ModelSpec, workload: Workload, plan: Plan, regime: Regime) -> int:
    width = compute_bytes(workload.precision)
    adapter = workload.adapter
    targets = set(adapter.target_modules) if adapter else set(model.linears)
    h, q, kv, f = model.hidden_size, model.query_size, model.kv_size, model.ffn_size

    def inputs(*consumers: str) -> int:
        """Copies kept of an input several projections read; autocast casts once for each."""
        used = [name for name in consumers if name in targets and name in model.linears]
        return len(used) if regime is Regime.AUTOCAST else min(1, len(used))

    norms = 2 * _norm_bytes_per_token(h, regime, adapter is None)
    if model.qk_norm:
        # The heads reach this norm in the compute type, so only fp32 runs skip the cast.
        head_norm = FP32 + width * (adapter is None)
        norms += (q + kv) * head_norm
    projections = h * width * (inputs("q_proj", "k_proj", "v_proj"))
    projections += h * width * (inputs("gate_proj", "up_proj"))
    # SDPA saves q, k, v, its output and one fp32 log-sum-exp a head; a mask makes transformers
    # repeat the key and value heads. The output projection reads the same output tensor, unless
    # the sequence-parallel exchange copied it, or an fp32 adapter had it cast up and down again.
    keys = q if workload.packing else kv
    attention = width * (2 * q + 2 * keys) + FP32 * model.num_heads
    copied = plan.cp > 1 or (adapter is not None and regime is Regime.AUTOCAST)
    if copied and "o_proj" in targets:
        attention += width * q
    # SwiGLU: gate, its activation, up, and the product when the down projection needs it.
    ffn = width * f * ((3 if model.gated_ffn else 1) + ("down_proj" in targets))
    adapters = 0
    if adapter:
        adapters = width * adapter.r * sum(name in targets for name in model.linears)
    return norms + projections + attention + ffn + adapters
