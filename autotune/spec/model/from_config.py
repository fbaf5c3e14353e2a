"""Read a `ModelSpec` out of a Hugging Face config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from autotune.errors import AutotuneError
from autotune.spec.model.families import FAMILIES, Config, Family
from autotune.spec.model.shape import ModelSpec, MoeSpec

_NEXT_TOKEN = ("ForCausalLM", "LMHeadModel")
"""How classes of models that predict the next token are called."""


def model_from_config(
    name: str,
    config: Mapping[str, Any],
    *,
    weights: str | None = None,
    tokenizer: str | None = None,
) -> ModelSpec:
    """Read the sizes out of a Hugging Face config.

    Raises:
        AutotuneError: an architecture that is not supported, weights that cannot be trained, or a
            size missing or malformed.
    """
    family = _family_of(name, config, weights)
    hidden, heads = _size(name, config, "hidden_size"), _size(name, config, "num_attention_heads")
    if hidden % heads and not (config.get("head_dim") or family.head_dim):
        raise AutotuneError(
            f"Config of {name!r}: hidden_size {hidden} is not a multiple of num_attention_heads "
            f"{heads} and head_dim is not given."
        )

    def flag(source: bool | str) -> bool:
        if isinstance(source, bool):
            return source
        return bool(config.get(source, source in family.flag_defaults))

    num_layers = _size(name, config, "num_hidden_layers")
    kv_heads = family.num_kv_heads if "num_key_value_heads" not in config else None
    window, num_window_layers = _windows(name, config, family, num_layers)
    return ModelSpec(
        name=name,
        architecture=config["model_type"],
        num_layers=num_layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=_size(name, config, "num_key_value_heads", default=kv_heads or heads),
        head_dim=_size(name, config, "head_dim", default=family.head_dim or hidden // heads),
        ffn_size=_size(name, config, "intermediate_size"),
        vocab_size=_size(name, config, "vocab_size"),
        tied_embeddings=flag("tie_word_embeddings"),
        moe=_experts(name, config, family, num_layers),
        qk_norm=family.qk_norm,
        norms_per_layer=family.norms_per_layer,
        norm_scales_in_fp32=family.norm_scales_in_fp32,
        qkv_bias=flag(family.qkv_bias),
        output_bias=flag(family.output_bias),
        mlp_bias=flag(family.mlp_bias),
        fused_projections=family.fused_projections,
        sinks=family.sinks,
        sliding_window=window,
        num_window_layers=num_window_layers,
        hf_config=dict(config),
        weights=weights,
        tokenizer=tokenizer,
    )


def _family_of(name: str, config: Mapping[str, Any], weights: str | None) -> Family:
    """Return the family, or say what about this config is not supported."""
    architecture = config.get("model_type")
    supported = f"Supported: {', '.join(sorted(FAMILIES))} (text decoders)."
    refuse_other_inputs(name, config, supported)
    family = FAMILIES.get(str(architecture))
    classes = [str(cls) for cls in config.get("architectures") or ()]
    if family is None:
        custom = ""
        if config.get("auto_map"):
            custom = " It needs the code in its own repository (auto_map), which is never run here."
        other = what_else(config)
        # Whether it can be built is for transformers to say, and takes seconds.
        estimated = (
            ""
            if other or custom
            else " 'autotune plan', 'estimate' and 'capacity' take any decoder that transformers "
            "itself can build; training another family was not checked."
        )
        raise AutotuneError(
            f"Model {name!r} has {describe_type(config)}{other}, which is not supported."
            f"{custom} {supported}{estimated}"
        )
    if config.get("auto_map") and classes and family.causal_lm not in classes:
        raise AutotuneError(
            f"Model {name!r} is {classes[0]} from the code in its own repository (auto_map), which "
            f"is never run here; transformers' {architecture} builds {family.causal_lm}."
        )
    if classes and not classes[0].endswith(_NEXT_TOKEN):
        raise AutotuneError(
            f"Model {name!r} is {classes[0]}, which does not predict the next token, and only "
            f"models that do are trained here: {family.causal_lm} for this model_type."
        )
    refuse_other_training(name, config, weights)
    return family


def describe_type(config: Mapping[str, Any]) -> str:
    """Return a config's model_type and class in words."""
    classes = config.get("architectures") or ()
    return f"model_type {config.get('model_type')!r}" + (f" ({classes[0]})" if classes else "")


def what_else(config: Mapping[str, Any]) -> str:
    """Return what a config says that makes it no text decoder; empty where it says nothing."""
    classes = [str(cls) for cls in config.get("architectures") or ()]
    if config.get("is_encoder_decoder"):
        return ", an encoder-decoder"
    if "vision_config" in config or "image_size" in config:
        return ", which reads images"
    if classes and not classes[0].endswith(_NEXT_TOKEN):
        return ", which is no decoder that predicts the next token"
    return ""


def refuse_other_inputs(name: str, config: Mapping[str, Any], supported: str) -> None:
    """Refuse a multi-modal model.

    Raises:
        AutotuneError: it has a text model among its parts.
    """
    text = config.get("text_config")
    if isinstance(text, Mapping):
        raise AutotuneError(
            f"Model {name!r} is multi-modal: its config holds a text_config beside other parts, "
            f"and only text models are trained here. Its text_config ({text.get('model_type')!r}) "
            f"alone, saved as a config.json, can be planned and searched. {supported}"
        )


def refuse_other_training(name: str, config: Mapping[str, Any], weights: str | None) -> None:
    """Refuse a decoder that is told to be something else, or whose weights are quantised.

    Raises:
        AutotuneError: saying which.
    """
    if config.get("use_bidirectional_attention"):
        raise AutotuneError(
            f"Model {name!r} attends in both directions (use_bidirectional_attention): it does not "
            "predict the next token, and only models that do are trained here."
        )
    quantized = config.get("quantization_config")
    if weights and quantized:
        method = quantized.get("quant_method") if isinstance(quantized, Mapping) else quantized
        raise AutotuneError(
            f"The weights of {name!r} are quantised ({method}), which are not trained here. Give a "
            "folder or a Hub id with bf16 or fp32 weights, or the config.json alone."
        )


def _experts(
    name: str, config: Mapping[str, Any], family: Family, num_layers: int
) -> MoeSpec | None:
    experts = family.experts
    if experts is None:
        return None
    # The configs of these families spell it either way; transformers takes both.
    other = {"num_local_experts": "num_experts", "num_experts": "num_local_experts"}
    key = experts.count_key
    key = key if key in config else other[key] if other[key] in config else key
    count = _size(name, config, key)
    chosen = _size(name, config, "num_experts_per_tok")
    if chosen > count:
        raise AutotuneError(
            f"Config of {name!r}: num_experts_per_tok {chosen} is above {key} {count}."
        )
    num_dense = _count_layers(name, config, experts.num_dense_layers, num_layers)
    if num_dense == num_layers:
        return None
    return MoeSpec(
        num_experts=count,
        experts_per_token=chosen,
        expert_ffn_size=_size(name, config, experts.ffn_key),
        router_bias=experts.router_bias,
        expert_biases=experts.biases,
        extra_intermediates=experts.extra_intermediates,
        num_dense_layers=num_dense,
    )


def _windows(
    name: str, config: Mapping[str, Any], family: Family, num_layers: int
) -> tuple[int | None, int]:
    if family.windows is None:
        return None, 0
    window = config.get("sliding_window", family.windows.default)
    if window is None:
        return None, 0
    count = _count_layers(name, config, family.windows.num_layers, num_layers)
    types = config.get("layer_types")
    if types is not None:
        listed = types if isinstance(types, list | tuple) else []
        known = all(kind in ("sliding_attention", "full_attention") for kind in listed)
        if not known or len(listed) != num_layers:
            raise AutotuneError(
                f"Config of {name!r}: layer_types must hold sliding_attention or full_attention "
                f"for each of the {num_layers} layers, not {types}."
            )
        count = listed.count("sliding_attention")
    if not count:
        return None, 0
    return _size(name, {"sliding_window": window}, "sliding_window"), count


def _count_layers(
    name: str, config: Mapping[str, Any], count: Callable[[Config, int], int], num_layers: int
) -> int:
    """Ask a family's function, which takes the config's keys as they are."""
    try:
        return count(config, num_layers)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise AutotuneError(
            f"Config of {name!r}: a key that says which layers are windowed or dense is "
            f"malformed: {error}."
        ) from error


def _size(name: str, config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise AutotuneError(
            f"Config of {name!r}: {key} must be a positive whole number, not {value!r}."
        )
    return value
