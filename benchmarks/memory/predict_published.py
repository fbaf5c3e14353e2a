"""Predict published rows: count the model, trace it, and walk through a step of its run."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import published
from foreign import Counts, Run, peak
from losses import with_loss
from published import Row

from autotune.errors import AutotuneError
from autotune.memory.profile import ActivationProfile
from autotune.memory.profiles import activation_profile, activation_profiles
from autotune.memory.setup import TraceKey
from autotune.memory.sizes import Sizes


@dataclass(frozen=True, slots=True)
class _Model:
    """What is counted on a model's real code, without weights."""

    total: int
    layers: tuple[int, ...]
    embedding: int
    head: int
    """0 when it is the embedding."""
    projections: dict[str, tuple[int, int]]
    largest: int
    vocab: int
    hidden: int
    linears: frozenset[str]
    """Names of the linear modules: what an adapter can target."""


@cache
def _model(config_json: str) -> _Model:
    import torch
    from torch import nn
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**json.loads(config_json)))
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
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return _Model(
        total=sum(p.numel() for p in model.parameters()),
        layers=tuple(sum(p.numel() for p in layer.parameters()) for layer in layers),
        embedding=embedding.numel(),
        head=0 if head is embedding else head.numel(),
        projections=projections,
        largest=max(p.numel() for p in model.parameters()),
        vocab=embedding.shape[0],
        hidden=embedding.shape[1],
        linears=frozenset(
            name.split(".")[-1]
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
        ),
    )


def counts_of(row: Row) -> Counts:
    """Count a row's model, its adapter among the layers."""
    model = _model(json.dumps(published.config_of(row), sort_keys=True))
    lora = published.lora_of(row)
    layers = np.array(model.layers, float)
    adapters = np.zeros_like(layers)
    if lora is not None:
        for name, (inputs, outputs) in model.projections.items():
            if name.split(".")[-1] in lora.target_modules:
                adapters[int(name.split(".")[0])] += lora.r * (inputs + outputs)
    root = model.total - sum(model.layers)
    frozen = lora is not None
    trained = adapters if frozen else layers
    return Counts(
        sizes=Sizes(
            embedding=model.embedding,
            head=model.head,
            norm=root - model.embedding - model.head,
            layers=layers + adapters,
            layers_trainable=trained,
            root_trainable=0 if frozen else root,
            module=model.largest,
            parameters=(int(trained.max()) if frozen else model.largest,),
            counts=(1,),
        ),
        projections=model.projections,
        vocab=model.vocab,
        hidden=model.hidden,
        extra_trained=2 * model.embedding if row["method"] == "lora+embeddings" else 0,
    )


@dataclass(frozen=True, slots=True)
class _Traced:
    """What `activation_profiles` reads of a model: any that transformers builds can be traced."""

    name: str
    hf_config: dict[str, Any]
    linears: frozenset[str]


def _traced(config_json: str) -> Any:
    config = json.loads(config_json)
    return _Traced("a published run's model", config, _model(config_json).linears)


def trace_all(rows: Iterable[Row]) -> None:
    """Look up the profiles of all rows, a model at a time."""
    wanted: dict[str, set[TraceKey]] = defaultdict(set)
    for row in rows:
        config = json.dumps(published.config_of(row), sort_keys=True)
        wanted[config].add(published.trace_key(row))
    for config, keys in wanted.items():
        model = _traced(config)
        try:
            activation_profiles(model, sorted(keys, key=repr))
        except AutotuneError as error:
            print(f"not traced: {json.loads(config)['model_type']}: {error}", file=sys.stderr)


@cache
def _profile(config_json: str, key: TraceKey) -> ActivationProfile:
    return activation_profile(_traced(config_json), key)


def predict(row: Row) -> tuple[float, str, Run]:
    """Return the predicted peak of a row's run in bytes, its instant, and the run."""
    config = json.dumps(published.config_of(row), sort_keys=True)
    counts = counts_of(row)
    run = published.run_of(row)
    profile = with_loss(_profile(config, run.setup.key), published.loss_of(row), counts.vocab)
    found, top = peak(profile, counts, run)
    return found, top, run


def predictable(row: dict[str, Any]) -> bool:
    """Say whether a row is predicted."""
    return row["use"] in published.PREDICTED and bool(row["seq_len"])
