"""`ModelSpec`: the shape of a decoder, and what follows from it by counting."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from autotune.spec.model.counted import Counted
from autotune.spec.workload import Lora

Shapes = dict[str, tuple[int, int]]
"""``(inputs, outputs)`` of projections by module name."""


class QkNorm(StrEnum):
    """RMSNorm of queries and keys."""

    NONE = "none"
    HEAD = "head"
    """Over each head (Qwen3, Gemma 3)."""
    WIDTH = "width"
    """Over all heads together (OLMo 2)."""


class MoeSpec(BaseModel):
    """Routed experts, whose weights transformers stacks into one parameter a projection."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_experts: PositiveInt
    experts_per_token: PositiveInt
    expert_ffn_size: PositiveInt
    router_bias: bool = False
    expert_biases: bool = False
    extra_intermediates: NonNegativeInt = 0
    """FFN-wide tensors an expert's activation saves beyond those of SwiGLU."""
    num_dense_layers: NonNegativeInt = 0
    """Layers with a dense FFN of `ModelSpec.ffn_size` in the place of experts."""


NAMES_AND_PLACES = {"name", "hf_config", "weights", "tokenizer", "local_path"}
"""Fields of `ModelSpec` that say what it is called and where it lies, nothing of its sizes."""


class ModelSpec(BaseModel):
    """Sizes of a decoder-only language model and where its files are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    architecture: str
    """Hugging Face ``model_type``."""
    num_layers: PositiveInt
    hidden_size: PositiveInt
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt
    ffn_size: PositiveInt
    """Of the dense FFN; a model of experts alone does not use it."""
    vocab_size: PositiveInt
    tied_embeddings: bool
    moe: MoeSpec | None = None
    qk_norm: QkNorm = QkNorm.NONE
    norms_per_layer: PositiveInt = 2
    """RMSNorms of the hidden size in a layer."""
    norm_scales_in_fp32: bool = False
    """RMSNorm multiplies by its weight before it casts to the compute type."""
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    fused_projections: bool = False
    """``qkv_proj`` and ``gate_up_proj`` (Phi-3)."""
    sinks: bool = False
    """One learned attention logit a head (gpt-oss)."""
    sliding_window: PositiveInt | None = None
    """Tokens a windowed layer sees, its own among them."""
    num_window_layers: NonNegativeInt = 0
    counted: Counted | None = Field(default=None, repr=False)
    """Parameters as the model itself has them, where no formula of this class counts them."""
    hf_config: dict[str, Any] = Field(repr=False)
    """Complete Hugging Face config with ``model_type``: ``AutoConfig.for_model(**hf_config)``."""
    weights: str | None = None
    """Folder or Hub id of pretrained weights; None builds random ones."""
    tokenizer: str | None = None
    """Folder or Hub id of the tokenizer."""
    local_path: str | None = None
    """Absolute path of the local folder or config file it was read from; None: of a name."""

    @property
    def query_size(self) -> int:
        """Width of the concatenated query heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of the concatenated key (or value) heads."""
        return self.num_kv_heads * self.head_dim

    @property
    def num_moe_layers(self) -> int:
        """Layers with experts."""
        return self.num_layers - self.moe.num_dense_layers if self.moe else 0

    @property
    def num_dense_layers(self) -> int:
        """Layers with a dense FFN."""
        return self.num_layers - self.num_moe_layers

    def num_window_layers_at(self, seq_len: int) -> int:
        """Layers whose window is shorter than a sequence of `seq_len` tokens."""
        shorter = self.sliding_window is not None and self.sliding_window < seq_len
        return self.num_window_layers if shorter else 0

    @property
    def attention_linears(self) -> Shapes:
        """Projections of the attention."""
        h, q, kv = self.hidden_size, self.query_size, self.kv_size
        if self.fused_projections:
            return {"qkv_proj": (h, q + 2 * kv), "o_proj": (q, h)}
        return {"q_proj": (h, q), "k_proj": (h, kv), "v_proj": (h, kv), "o_proj": (q, h)}

    @property
    def ffn_linears(self) -> Shapes:
        """Projections of a dense FFN."""
        h, f = self.hidden_size, self.ffn_size
        if self.fused_projections:
            return {"gate_up_proj": (h, 2 * f), "down_proj": (f, h)}
        return {"gate_proj": (h, f), "up_proj": (h, f), "down_proj": (f, h)}

    @property
    def linears(self) -> Shapes:
        """Projections every layer has as a module: what LoRA can target.

        Experts are stacked parameters, not modules, and leave the attention's. The smallest of a
        name, where a counted model has several.
        """
        if self.counted:
            ordered = sorted(self.counted.projections, key=lambda p: -p.inputs * p.outputs)
            everywhere = {p.name for p in ordered if p.count == self.num_layers}
            return {p.name: (p.inputs, p.outputs) for p in ordered if p.name in everywhere}
        return self.attention_linears | ({} if self.num_moe_layers else self.ffn_linears)

    @property
    def projections(self) -> list[tuple[tuple[int, int], int]]:
        """Shapes of the layers' linear modules, and how many of each there are in the model."""
        if self.counted:
            return [((p.inputs, p.outputs), p.count) for p in self.counted.projections]
        attention = [(shape, self.num_layers) for shape in self.attention_linears.values()]
        return attention + [(shape, self.num_dense_layers) for shape in self.ffn_linears.values()]

    @property
    def num_router_parameters(self) -> int:
        """Router of one layer with experts."""
        return self.moe.num_experts * (self.hidden_size + self.moe.router_bias) if self.moe else 0

    @property
    def num_expert_parameters(self) -> int:
        """One expert: gate, up and down projection with their biases."""
        if not self.moe:
            return 0
        h, f = self.hidden_size, self.moe.expert_ffn_size
        return 3 * h * f + (2 * f + h) * self.moe.expert_biases

    @property
    def num_dense_ffn_parameters(self) -> int:
        """The FFN of one layer without experts."""
        biases = sum(outputs for _, outputs in self.ffn_linears.values()) * self.mlp_bias
        return _weights(self.ffn_linears) + biases

    @property
    def num_attention_parameters(self) -> int:
        """Attention and norms of one layer."""
        outputs = {name: shape[1] for name, shape in self.attention_linears.items()}
        output_bias = outputs.pop("o_proj") * self.output_bias
        biases = sum(outputs.values()) * self.qkv_bias + output_bias
        match self.qk_norm:
            case QkNorm.NONE:
                norms = 0
            case QkNorm.HEAD:
                norms = 2 * self.head_dim
            case QkNorm.WIDTH:
                norms = self.query_size + self.kv_size
        norms += self.norms_per_layer * self.hidden_size
        sinks = self.num_heads * self.sinks
        return _weights(self.attention_linears) + biases + norms + sinks

    @property
    def num_parameters_per_layer(self) -> int:
        """All parameters of one decoder layer, the largest where layers differ."""
        if self.counted:
            return max(self.counted.layers)
        experts = self.moe.num_experts if self.moe else 0
        sparse = self.num_router_parameters + experts * self.num_expert_parameters
        dense = self.num_dense_ffn_parameters * (self.num_dense_layers > 0)
        return self.num_attention_parameters + max(sparse, dense)

    @property
    def num_embedding_parameters(self) -> int:
        """Token embedding; the output head has as many, shared when `tied_embeddings`."""
        if self.counted:
            return self.counted.embedding
        return self.vocab_size * self.hidden_size

    @property
    def num_root_parameters(self) -> int:
        """Parameters outside the decoder layers: embedding, output head, final norm."""
        if self.counted:
            return self.counted.embedding + self.counted.head + self.counted.rest
        copies = 1 if self.tied_embeddings else 2
        return copies * self.num_embedding_parameters + self.hidden_size

    @property
    def num_parameters(self) -> int:
        """Exact count of distinct parameters (a tied head counts once)."""
        if self.counted:
            return self.counted.total
        return self._parameters_with(self.moe.num_experts if self.moe else 0)

    @property
    def num_active_parameters(self) -> int:
        """Parameters one token passes through, the embedding table counted whole."""
        if self.counted:
            return self.counted.active
        return self._parameters_with(self.moe.experts_per_token if self.moe else 0)

    def _parameters_with(self, experts_per_layer: int) -> int:
        sparse = self.num_router_parameters + experts_per_layer * self.num_expert_parameters
        return (
            self.num_layers * self.num_attention_parameters
            + self.num_moe_layers * sparse
            + self.num_dense_layers * self.num_dense_ffn_parameters
            + self.num_root_parameters
        )

    @property
    def num_matmul_parameters(self) -> int:
        """Weights that multiply each token: projections, its experts, head; not the embedding."""
        if self.counted:
            return self.counted.active_matrices + self.counted.embedding
        experts = self.moe.experts_per_token if self.moe else 0
        return self._matmul_parameters_with(experts) + self.num_embedding_parameters

    @property
    def num_layer_matmul_parameters(self) -> int:
        """Weights of all matrix products of all layers, every expert's among them."""
        if self.counted:
            return sum(self.counted.matrices)
        return self._matmul_parameters_with(self.moe.num_experts if self.moe else 0)

    def _matmul_parameters_with(self, experts_per_layer: int) -> int:
        return (
            self.num_layers * _weights(self.attention_linears)
            + self.num_moe_layers * self._moe_weights(experts_per_layer)
            + self.num_dense_layers * _weights(self.ffn_linears)
        )

    def _moe_weights(self, num_experts: int) -> int:
        if not self.moe:
            return 0
        router = self.moe.num_experts * self.hidden_size
        return router + num_experts * 3 * self.hidden_size * self.moe.expert_ffn_size

    @property
    def largest_parameter(self) -> int:
        """Elements of the largest parameter: a projection, the head, or stacked experts."""
        if self.counted:
            return max(self.counted.embedding, self.counted.head, *self.counted.sizes)
        gate_up = 0
        if self.moe:
            gate_up = 2 * self.moe.num_experts * self.hidden_size * self.moe.expert_ffn_size
        return max(self.num_embedding_parameters, gate_up, *self._module_sizes())

    @property
    def largest_module(self) -> int:
        """Elements of the largest module ZeRO-3 gathers at once: here a layer's experts."""
        if self.counted:
            return max(self.counted.embedding, self.counted.head, self.counted.largest_module)
        experts = self.moe.num_experts * self.num_expert_parameters if self.moe else 0
        return max(self.num_embedding_parameters, experts, *self._module_sizes())

    def _module_sizes(self) -> list[int]:
        ffn = self.ffn_linears if self.num_dense_layers else {}
        return [inputs * outputs for inputs, outputs in (self.attention_linears | ffn).values()]

    def num_adapter_parameters(self, adapter: Lora) -> int:
        """Parameters LoRA adds: ``r * (inputs + outputs)`` a targeted projection, DoRA an output.

        Hu et al., arXiv:2106.09685; Liu et al., arXiv:2402.09353. Names that are no projection of
        this model add nothing; a rule reports them.
        """
        if self.counted:
            own = [p for p in self.counted.projections if p.name in adapter.target_modules]
            return sum(
                p.count * (adapter.r * (p.inputs + p.outputs) + p.outputs * adapter.dora)
                for p in own
            )
        targets = [shape for name, shape in self.linears.items() if name in adapter.target_modules]
        return self.num_layers * sum(
            adapter.r * (inputs + outputs) + outputs * adapter.dora for inputs, outputs in targets
        )


def _weights(shapes: Shapes) -> int:
    return sum(inputs * outputs for inputs, outputs in shapes.values())
