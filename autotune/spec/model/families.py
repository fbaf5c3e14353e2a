"""What each supported `model_type` decides that its config leaves to the code.

Source of every entry: ``modeling_*.py`` and ``configuration_*.py`` of transformers 5. A default
here is the one the family's configuration class takes when the key is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from autotune.spec.model.shape import QkNorm

Config = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts:
    """Where a family's config states its routed experts."""

    count_key: str
    ffn_key: str
    router_bias: bool = False
    biases: bool = False
    """On both projections of every expert."""
    extra_intermediates: int = 0
    """FFN-wide tensors an expert's activation saves beside gate, up, their product and SiLU."""
    num_dense_layers: Callable[[Config, int], int] = lambda config, num_layers: 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Windows:
    """A family's sliding windows."""

    default: int | None
    """Of `sliding_window` when the config does not state it."""
    num_layers: Callable[[Config, int], int]
    """How many of the layers have it, unless `layer_types` lists them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """The facts that tell decoder families apart; a string names the config's boolean key."""

    causal_lm: str
    """The class ``AutoModelForCausalLM`` builds."""
    qkv_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: QkNorm = QkNorm.NONE
    norms_per_layer: int = 2
    norm_scales_in_fp32: bool = False
    """The weight multiplies before the cast to the compute type, not after it."""
    fused_projections: bool = False
    """``qkv_proj`` and ``gate_up_proj`` in place of three and two projections."""
    sinks: bool = False
    """One learned logit a head that takes part in the softmax and has no value."""
    experts: Experts | None = None
    windows: Windows | None = None
    flag_defaults: tuple[str, ...] = ()
    """Boolean keys that are true when the config does not state them."""
    head_dim: int | None = None
    """When the config does not state it; None divides the hidden size by the heads."""
    num_kv_heads: int | None = None
    """When the config does not state it; None takes the number of heads."""


def _every_layer(config: Config, num_layers: int) -> int:
    return num_layers


def _every_layer_when_switched_on(config: Config, num_layers: int) -> int:
    return num_layers if config.get("use_sliding_window") else 0


def _upper_layers_when_switched_on(config: Config, num_layers: int) -> int:
    if not config.get("use_sliding_window"):
        return 0
    return max(0, num_layers - int(config.get("max_window_layers", 28)))


def _all_but_every_sixth(config: Config, num_layers: int) -> int:
    return num_layers - num_layers // int(config.get("sliding_window_pattern", 6))


def _every_other(config: Config, num_layers: int) -> int:
    return (num_layers + 1) // 2


def _layers_without_experts(config: Config, num_layers: int) -> int:
    step, listed = int(config.get("decoder_sparse_step", 1)), config.get("mlp_only_layers") or ()
    return sum(i in listed or (i + 1) % step != 0 for i in range(num_layers))


FAMILIES: dict[str, Family] = {
    "gemma3_text": Family(
        causal_lm="Gemma3ForCausalLM",
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm=QkNorm.HEAD,
        norms_per_layer=4,
        norm_scales_in_fp32=True,
        windows=Windows(default=4096, num_layers=_all_but_every_sixth),
        flag_defaults=("tie_word_embeddings",),
        head_dim=256,
        num_kv_heads=4,
    ),
    "gpt_oss": Family(
        causal_lm="GptOssForCausalLM",
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        norm_scales_in_fp32=True,
        sinks=True,
        experts=Experts(
            count_key="num_local_experts",
            ffn_key="intermediate_size",
            router_bias=True,
            biases=True,
            # Clamped gate, its sigmoid, up + 1, and gate * sigmoid in the place of the SiLU.
            extra_intermediates=3,
        ),
        windows=Windows(default=128, num_layers=_every_other),
        flag_defaults=("attention_bias",),
        head_dim=64,
        num_kv_heads=8,
    ),
    "llama": Family(
        causal_lm="LlamaForCausalLM",
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias="mlp_bias",
    ),
    "mistral": Family(
        causal_lm="MistralForCausalLM",
        windows=Windows(default=4096, num_layers=_every_layer),
        num_kv_heads=8,
    ),
    "mixtral": Family(
        causal_lm="MixtralForCausalLM",
        experts=Experts(count_key="num_local_experts", ffn_key="intermediate_size"),
        windows=Windows(default=None, num_layers=_every_layer),
        num_kv_heads=8,
    ),
    "olmo2": Family(
        causal_lm="Olmo2ForCausalLM",
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm=QkNorm.WIDTH,
        norm_scales_in_fp32=True,
    ),
    "phi3": Family(
        causal_lm="Phi3ForCausalLM",
        fused_projections=True,
        windows=Windows(default=None, num_layers=_every_layer),
    ),
    "qwen2": Family(
        causal_lm="Qwen2ForCausalLM",
        qkv_bias=True,
        windows=Windows(default=4096, num_layers=_upper_layers_when_switched_on),
        num_kv_heads=32,
    ),
    "qwen3": Family(
        causal_lm="Qwen3ForCausalLM",
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm=QkNorm.HEAD,
        windows=Windows(default=4096, num_layers=_upper_layers_when_switched_on),
        head_dim=128,
        num_kv_heads=32,
    ),
    "qwen3_moe": Family(
        causal_lm="Qwen3MoeForCausalLM",
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm=QkNorm.HEAD,
        experts=Experts(
            count_key="num_experts",
            ffn_key="moe_intermediate_size",
            num_dense_layers=_layers_without_experts,
        ),
        windows=Windows(default=4096, num_layers=_every_layer_when_switched_on),
        num_kv_heads=4,
    ),
}
