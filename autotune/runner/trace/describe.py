"""What a model is, asked of the model itself: built by transformers without weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from autotune.errors import AutotuneError
from autotune.runner.experts import register_experts
from autotune.runner.trace.models import build_whole, find_layers
from autotune.runner.ulysses import ATTENTION_NAME, register_attention
from autotune.spec.model.counted import Counted, Projection

# How transformers' configs call the number of experts a token goes to.
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k")
_STACKED = 3
"""Dimensions of a parameter that holds all experts' weights."""


def describe(config: dict[str, Any]) -> Counted:
    """Build a model on ``meta`` and count its parameters.

    Args:
        config: the Hugging Face config with ``model_type``.

    Raises:
        AutotuneError: transformers cannot build it, or it does not predict the next token.
    """
    _refuse_other_models(config)
    register_attention()
    register_experts()
    model = build_whole(config, dtype=torch.float32, attention=ATTENTION_NAME)
    if _looks_both_ways(model.config):
        raise AutotuneError(
            f"{type(model).__name__} is an encoder (is_decoder is not set): it does not predict "
            "the next token, and only models that do are estimated."
        )
    layers = find_layers(model)[1]
    embedding = model.get_input_embeddings().weight
    head = getattr(model.get_output_embeddings(), "weight", None)
    own_head = 0 if head is None or head is embedding else head.numel()
    parameters = [list(layer.parameters()) for layer in layers]
    elements = [_elements(each) for each in parameters]
    matrices = [_elements(p for p in each if p.dim() > 1) for each in parameters]
    total = _elements(model.parameters())
    idle = _idle_experts(model.config, layers)
    projections = _projections(layers)
    return Counted(
        causal_lm=type(model).__name__,
        total=total,
        active=total - idle,
        embedding=embedding.numel(),
        head=own_head,
        rest=total - embedding.numel() - own_head - sum(elements),
        layers=tuple(elements),
        matrices=tuple(matrices),
        active_matrices=sum(matrices) - idle,
        sizes=dict(Counter(p.numel() for each in parameters for p in each)),
        largest_module=max(
            _elements(module.parameters(recurse=False)) for module in layers.modules()
        ),
        projections=projections,
        attributes=_attributes(model.config, layers, projections),
    )


def _refuse_other_models(config: dict[str, Any]) -> None:
    kind = str(config.get("model_type"))
    if kind not in CONFIG_MAPPING:
        own_code = " Code in its own repository (auto_map, trust_remote_code) is never run here."
        raise AutotuneError(
            f"transformers {transformers.__version__} knows no model_type {kind!r}."
            + own_code * bool(config.get("auto_map"))
        )
    if kind not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise AutotuneError(
            f"transformers has no model of model_type {kind!r} that predicts the next token "
            "(AutoModelForCausalLM), and only models that do are estimated."
        )


def _looks_both_ways(config: Any) -> bool:
    """Say whether it is an encoder's class that also predicts next tokens when it is told to."""
    masked = config.model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return masked and not getattr(config, "is_decoder", False)


def _elements(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in {id(p): p for p in parameters}.values())


def _idle_experts(config: Any, layers: nn.ModuleList) -> int:
    """Return the elements of stacked experts that one token does not reach."""
    chosen = _first(config, _CHOSEN)
    stacked = [p for p in layers.parameters() if p.dim() == _STACKED]
    return sum(
        p.numel() // p.shape[0] * max(0, p.shape[0] - (chosen or p.shape[0])) for p in stacked
    )


def _projections(layers: nn.ModuleList) -> tuple[Projection, ...]:
    found: Counter[tuple[str, int, int]] = Counter()
    for layer in layers:
        for path, module in layer.named_modules():
            # A subclass does more than multiply (a router hands on a choice): no adapter takes it.
            if type(module) is nn.Linear:
                found[path, module.in_features, module.out_features] += 1
            elif isinstance(module, Conv1D):
                found[path, module.nx, module.nf] += 1
    return tuple(
        Projection(path=path, inputs=inputs, outputs=outputs, count=count)
        for (path, inputs, outputs), count in found.items()
    )


def _attributes(
    config: Any, layers: nn.ModuleList, projections: tuple[Projection, ...]
) -> dict[str, Any]:
    """Return the fields of `ModelSpec`, as the model's parsed config has them."""
    hidden, heads = _first(config, ("hidden_size",)), _first(config, ("num_attention_heads",))
    if not hidden or not heads:
        raise AutotuneError(
            f"The config of model_type {config.model_type!r} states no number of attention heads: "
            "only decoders that attend in every layer are estimated."
        )
    window = _first(config, ("sliding_window",))
    windowed = _count_windows(config, layers) if window else 0
    widest = max((p.outputs for p in projections), default=hidden)
    found: dict[str, Any] = {
        "hidden_size": hidden,
        "num_heads": heads,
        "num_kv_heads": _first(config, ("num_key_value_heads",)) or heads,
        "head_dim": _first(config, ("head_dim", "qk_head_dim")) or max(1, hidden // heads),
        "ffn_size": _first(config, ("intermediate_size", "ffn_hidden_size")) or widest,
        "vocab_size": config.vocab_size,
        "sliding_window": window if windowed else None,
        "num_window_layers": windowed,
    }
    stacks = [p for p in layers.parameters() if p.dim() == _STACKED]
    if stacks:
        sparse = sum(any(p.dim() == _STACKED for p in layer.parameters()) for layer in layers)
        count = stacks[0].shape[0]
        found["moe"] = {
            "num_experts": count,
            "experts_per_token": min(_first(config, _CHOSEN) or count, count),
            # Of experts with three products, as large as these.
            "expert_ffn_size": max(1, _elements(stacks) // (sparse * count * 3 * hidden)),
            "num_dense_layers": len(layers) - sparse,
        }
    return found


def _count_windows(config: Any, layers: nn.ModuleList) -> int:
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return list(kinds).count("sliding_attention")
    return sum(
        any(getattr(module, "sliding_window", None) for module in layer.modules())
        for layer in layers
    )


def _first(config: Any, names: tuple[str, ...]) -> int | None:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None
