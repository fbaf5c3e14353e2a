"""What one decoder layer saves for backward, counted tensor by tensor.

The inventory follows transformers 5 (``modeling_*.py`` of the families in
`autotune.spec.model.families`: RMSNorm that computes in fp32, rotary embedding, SDPA, SwiGLU,
experts as grouped matrix products) and PyTorch's autograd formulas. A test compares it with the
bytes that `torch.autograd.graph.saved_tensors_hooks` sees in the real models.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from autotune.plan import CpBackend, Engine, Plan
from autotune.spec.model import ModelSpec, MoeSpec, QkNorm
from autotune.spec.workload import Precision, Workload

FP32 = 4
_INDEX = 8

# Features and positions the sink adds in `autotune.runner.attention`.
_SINK_PADDING = 8


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


@dataclass(frozen=True, slots=True)
class LayerInventory:
    """Counts saved bytes of one layer and micro-batch on one rank."""

    model: ModelSpec
    workload: Workload
    plan: Plan

    @property
    def regime(self) -> Regime:
        """Types of the forward pass."""
        return regime_of(self.plan, self.workload.precision)

    @property
    def width(self) -> int:
        """Bytes of an element of the matrix products."""
        return compute_bytes(self.workload.precision)

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on this rank."""
        return self.plan.micro_batch_size * self.workload.seq_len // self.plan.cp

    @property
    def _frozen(self) -> bool:
        return self.workload.adapter is not None

    def _trains(self, name: str) -> bool:
        adapter = self.workload.adapter
        return name in self.model.linears and (adapter is None or name in adapter.target_modules)

    def _inputs(self, *consumers: str) -> int:
        """Copies kept of an input several projections read; autocast casts once for each."""
        used = sum(map(self._trains, consumers))
        return used if self.regime is Regime.AUTOCAST else min(1, used)

    @property
    def _ring(self) -> bool:
        return self.plan.cp > 1 and self.plan.cp_backend is CpBackend.RING

    @property
    def _packed(self) -> bool:
        """Whether documents are told apart by a mask; the ring's kernels know their lengths."""
        return self.workload.packing and not self._ring

    def kinds(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Return saved bytes and number of layers of each kind of attention and of FFN."""
        model = self.model
        windowed = model.num_window_layers_at(self.workload.seq_len)
        attention = [
            (self.attention(windowed=True), windowed),
            (self.attention(windowed=False), model.num_layers - windowed),
        ]
        ffn = [(self.dense_ffn(), model.num_dense_layers)]
        if model.moe:
            ffn.append((self.moe_ffn(model.moe), model.num_moe_layers))
        return attention, ffn

    def norm(self, size: int) -> int:
        """RMSNorm, a token: input and scale in fp32 and, for the weight, the normalised input."""
        after_cast = 2 if self.regime is Regime.COMPUTE else FP32
        normalised = FP32 if self.model.norm_scales_in_fp32 else after_cast
        return size * (FP32 + normalised * (not self._frozen)) + FP32

    def attention(self, *, windowed: bool) -> int:
        """Attention with all norms of a layer.

        Args:
            windowed: whether the layer's window is shorter than the sequence.
        """
        model, width = self.model, self.width
        q, kv = model.query_size, model.kv_size
        norms = model.norms_per_layer * self.norm(model.hidden_size)
        if model.qk_norm is not QkNorm.NONE:
            # The heads reach this norm in the compute type, so only fp32 runs skip the cast.
            normalised = FP32 if model.norm_scales_in_fp32 else width
            norms += (q + kv) * (FP32 + normalised * (not self._frozen))
            heads = model.num_heads + model.num_kv_heads
            norms += FP32 * (heads if model.qk_norm is QkNorm.HEAD else 2)
        inputs = model.hidden_size * width * self._inputs("q_proj", "k_proj", "v_proj", "qkv_proj")
        masked = windowed or self._packed
        repeated = masked and model.num_heads > model.num_kv_heads
        kept = inputs + norms
        if model.fused_projections and not repeated:
            # The values are a view of the fused projection's output, which stays whole.
            kept += width * (q + kv)
        # The output projection reads the tensor SDPA saved, unless it had to be copied: by the
        # sequence-parallel exchange, by the sink's removal, into another order (Phi-3's rotary
        # embedding leaves queries, so SDPA's output, head by head), or cast for an fp32 adapter.
        # The ring over packed sequences stacks them; over plain ones its output is what is kept.
        exchanged = self.plan.cp > 1 and (self.workload.packing or not self._ring)
        copied = exchanged or model.sinks or model.fused_projections
        copied = copied or (self._frozen and self.regime is Regime.AUTOCAST)
        if copied and self._trains("o_proj"):
            kept += width * q
        adapters = 0
        if self.workload.adapter is not None:
            adapters = width * self.workload.adapter.r * sum(map(self._trains, model.linears))
        return self.tokens * (kept + adapters) + self._sdpa(masked, repeated)

    def _sdpa(self, masked: bool, repeated: bool) -> int:
        """Query, key, value, output and one fp32 log-sum-exp a head; the mask where there is one.

        A mask makes transformers repeat the key and value heads.
        """
        model, plan, length = self.model, self.plan, self.workload.seq_len + self.model.sinks
        size = model.head_dim + _SINK_PADDING * model.sinks
        kv_heads = model.num_heads if repeated else model.num_kv_heads
        position = self.width * size * (2 * model.num_heads + 2 * kv_heads) + FP32 * model.num_heads
        saved = plan.micro_batch_size * length * position // plan.cp
        if masked:
            # SDPA turns the boolean mask into the compute type and saves that. It spans the whole
            # sequence on every sequence-parallel rank; a window alone is the same for all.
            masks = plan.micro_batch_size if self._packed else 1
            saved += self.width * masks * length**2
        return saved

    def masks(self) -> int:
        """Boolean masks all layers share: the documents', the window's, and the sinks'."""
        model, length = self.model, self.workload.seq_len
        packed = self.plan.micro_batch_size if self._packed else 0
        windowed = model.num_window_layers_at(length)
        made = packed * length**2
        kinds = (windowed > 0) + (bool(packed) and model.sinks and windowed < model.num_layers)
        return made + kinds * max(1, packed) * (length + model.sinks) ** 2

    def dense_ffn(self) -> int:
        """SwiGLU: gate, its activation, up, and the product when the down projection needs it."""
        gate_up = self._inputs("gate_proj", "up_proj", "gate_up_proj") * self.model.hidden_size
        saved = gate_up + self.model.ffn_size * (3 + self._trains("down_proj"))
        return self.tokens * self.width * saved

    def moe_ffn(self, moe: MoeSpec) -> int:
        """Router and the experts' grouped matrix products over the tokens' assignments."""
        h, k, width = self.model.hidden_size, moe.experts_per_token, self.width
        trained = not self._frozen
        router = h * width * trained + moe.num_experts * FP32
        # Sorting, gathering and restoring keep an index each; so does the choice.
        indices = 4 * _INDEX * k
        ffn = moe.expert_ffn_size * (3 + moe.extra_intermediates + trained)
        # Gathered inputs for the weights' gradient, outputs for the router's.
        assignment = width * (ffn + h * (1 + trained))
        return self.tokens * (router + indices + k * assignment)

    def gradients(self, stream: int) -> int:
        """Largest set of activation gradients alive inside one layer's backward.

        Args:
            stream: bytes of an element of the hidden states between the layers.
        """
        model, ffn = self.model, 0
        if model.num_dense_layers:
            ffn = 3 * model.ffn_size
        if model.moe:
            moe = model.moe
            ffn = max(ffn, moe.experts_per_token * (3 * moe.expert_ffn_size + model.hidden_size))
        ffn_bytes = self.tokens * (self.width * ffn + 2 * model.hidden_size * stream)
        return max(ffn_bytes, self._ring_backward())

    def _ring_backward(self) -> int:
        """Bytes of the ring's backward of one layer, `autotune.runner.ring`; 0 without.

        Plain: a buffer of each gradient and its fp32 sum, and on their way two blocks of keys and
        values and one of their sums. Packed: the gradients, keys and values of all ranks twice and
        their gradients once, `heads_k_stride` heads at a time; counted for all sequences, though
        one is gathered at a time, so that the larger of this and the FFN's is one at every size.
        """
        if not self._ring:
            return 0
        model, width = self.model, self.width
        queries, keys = self.tokens * model.query_size, 2 * self.tokens * model.kv_size
        if not self.workload.packing:
            return (queries + keys) * (width + FP32) + keys * (2 * width + FP32)
        heads = model.head_dim * self.plan.heads_k_stride
        return width * (queries + keys + 6 * self.tokens * self.plan.cp * heads)
