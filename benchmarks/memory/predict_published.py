"""Predict every published row that is predicted at all: the estimator's answer and ours of peers."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import published
from foreign import Run, Sizes, peak
from losses import with_loss
from published import Row

from autotune.memory.profile import ActivationProfile
from autotune.memory.setup import TraceKey


@cache
def sizes_of(config_json: str) -> Sizes:
    """Count a model on its real code, without weights."""
    import torch
    from torch import nn
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**json.loads(config_json)))
    total = sum(p.numel() for p in model.parameters())
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    layers = max(lists, key=lambda m: sum(p.numel() for p in m.parameters()))
    projections = {
        f"{place}.{name}": (module.weight.shape[1], module.weight.shape[0])
        for place, layer in enumerate(layers)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    }
    # Experts are stacked parameters: each is a matrix of its own to a quantiser.
    for place, layer in enumerate(layers):
        for name, parameter in layer.named_parameters():
            if parameter.dim() == 3:
                count, rows, columns = parameter.shape
                for expert in range(count):
                    projections[f"{place}.{name}.{expert}"] = (columns, rows)
    per_layer = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    return Sizes(
        total=total,
        root=total - sum(per_layer),
        layer=max(per_layer),
        head=model.get_output_embeddings().weight.numel(),
        projections=projections,
        largest=max(p.numel() for p in model.parameters()),
        hidden=model.get_input_embeddings().weight.shape[1],
        vocab=model.get_input_embeddings().weight.shape[0],
    )


@cache
def profile_of(config_json: str, key: TraceKey) -> ActivationProfile:
    """Trace a model under a key, once."""
    from autotune.runner.trace.profiles import trace_profile

    return trace_profile(json.loads(config_json), key)


def adapter_elements(row: Row, sizes: Sizes) -> int:
    """Count what LoRA adds to the projections it names."""
    lora = published.lora_of(row)
    if lora is None:
        return 0
    return lora.r * sum(
        inputs + outputs
        for name, (inputs, outputs) in sizes.projections.items()
        if name.split(".")[-1] in lora.target_modules
    )


def predict(row: Row) -> tuple[float, str, Run]:
    """Return the predicted peak of a row's run in bytes, its instant, and the run."""
    config = json.dumps(published.config_of(row), sort_keys=True)
    sizes = sizes_of(config)
    run = published.run_of(row, adapter_elements(row, sizes))
    profile = with_loss(
        profile_of(config, run.setup.key),
        published.loss_of(row),
        sizes.vocab,
        sizes.hidden,
        head_trains=row["method"] == "full",
    )
    found, top = peak(profile, sizes, run)
    return found, top, run


def predictable(row: dict[str, Any]) -> bool:
    """Say whether a row is predicted."""
    return row["use"] in published.PREDICTED and bool(row["seq_len"])
