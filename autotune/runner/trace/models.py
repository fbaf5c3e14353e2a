"""The model to trace: the real one without weights, cut to a few of its layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from autotune.errors import AutotuneError
from autotune.runner.experts import EXPERTS_NAME
from autotune.runner.models import add_adapter
from autotune.spec.workload import Lora

_BUILDING_ERRORS = (
    StrictDataclassError,  # a field of the wrong type
    ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError, ZeroDivisionError,
)  # fmt: skip
_LONGEST = 300
"""Characters of another library's message."""
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True, slots=True)
class Cut:
    """A model with some of its decoder layers, still without storage (on ``meta``)."""

    model: Any
    layers: nn.ModuleList
    chosen: tuple[int, ...]
    """Which of the full model's layers are left, ascending."""
    stands_for: tuple[int, ...]
    """For each layer of the full model, its place in `chosen`."""

    @property
    def copies(self) -> list[int]:
        """How many of the full model's layers each of those left stands for."""
        return [self.stands_for.count(place) for place in range(len(self.chosen))]


def build(
    config: dict[str, Any], *, dtype: torch.dtype, attention: str, adapter: Lora | None
) -> Cut:
    """Build a model on ``meta`` and leave the layers that tell all others.

    Kept are the first and the last layer of each kind, and the last stands for those between: a
    kind's first may make what its others use (a window's mask), and under a frozen embedding the
    first layer keeps less.

    Raises:
        AutotuneError: transformers cannot build it, or its layers are not one list.
    """
    model = build_whole(config, dtype=dtype, attention=attention)
    name, layers = find_layers(model)
    kinds = _kinds(layers)
    chosen, stands_for = _choose(kinds)
    _cut_config(model.config, len(layers), chosen)
    kept = nn.ModuleList(layers[i] for i in chosen)
    for place, layer in enumerate(kept):
        _renumber(layer, chosen[place], place)
    model.set_submodule(name, kept)
    if adapter is not None:
        model = add_adapter(model, adapter)
    return Cut(model, kept, chosen, stands_for)


def materialise(cut: Cut) -> None:
    """Give the parameters fake storage; call under `FakeTensorMode`."""
    cut.model.to_empty(device="cpu")
    cut.model.tie_weights()
    for module in cut.model.modules():
        # Tables that grow with the longest position read positions, which are not there. What they
        # change is a vector of half a head's size.
        if hasattr(module, "rope_type"):
            static = module.rope_type
            module.rope_type = (
                dict.fromkeys(static, "default") if isinstance(static, dict) else "default"
            )


def build_whole(config: dict[str, Any], *, dtype: torch.dtype, attention: str) -> Any:
    """Build the whole model on ``meta``.

    Raises:
        AutotuneError: transformers cannot build it.
    """
    try:
        parsed = AutoConfig.for_model(**config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                parsed,
                dtype=dtype,
                attn_implementation=attention,
                experts_implementation=EXPERTS_NAME,
            )
    except _BUILDING_ERRORS as error:
        if isinstance(error, KeyError) and error.args == (attention,):
            # A family's own table of attention classes, from before transformers had functions.
            raise AutotuneError(no_interface(f"model_type {config.get('model_type')!r}")) from error
        said = " ".join(str(error).split())[:_LONGEST] or type(error).__name__
        raise AutotuneError(
            "transformers cannot build the model of this config.json "
            f"(model_type {config.get('model_type')!r}): {said}"
        ) from error
    model.config.use_cache = False
    return model


def no_interface(what: str) -> str:
    """Return what to say of a model whose attention cannot be told what to run."""
    return (
        f"{what} computes attention by itself, not through transformers' attention functions, so "
        "what the engines would run cannot be traced."
    )


def find_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the name and the list of a model's decoder layers.

    Raises:
        AutotuneError: they are not one list.
    """
    count = getattr(model.config, "num_hidden_layers", None)
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not lists:
        raise AutotuneError(
            f"{type(model).__name__} holds no list of its {count} decoder layers, so its memory "
            "cannot be traced layer by layer."
        )
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def _kinds(layers: nn.ModuleList) -> list[int]:
    """Tell layers apart by their parameters' shapes and their modules' plain attributes.

    An attribute that counts the layers (``layer_idx``) tells nothing.
    """
    described = [dict(_describe(layer)) for layer in layers]
    counting = {name for name in described[0] if _counts(d.get(name) for d in described)}
    kinds: dict[tuple[tuple[str, str], ...], int] = {}
    found = []
    for attributes in described:
        told = ((name, repr(value)) for name, value in attributes.items() if name not in counting)
        found.append(kinds.setdefault(tuple(sorted(told)), len(kinds)))
    return found


def _counts(values: Iterable[object]) -> bool:
    values = list(values)
    return all(_is_int(value) and value == values[0] + i for i, value in enumerate(values))  # type: ignore[operator]


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _describe(layer: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, parameter in layer.named_parameters():
        yield f"parameter {name}", tuple(parameter.shape)
    for name, module in layer.named_modules():
        yield f"class {name}", type(module).__qualname__
        for attribute, value in vars(module).items():
            if isinstance(value, _PLAIN) and attribute != "training":
                yield f"{name}.{attribute}", value


def _renumber(layer: nn.Module, old: int, new: int) -> None:
    for module in layer.modules():
        for attribute, value in vars(module).items():
            if attribute.endswith("idx") and _is_int(value) and value == old:
                setattr(module, attribute, new)


def _choose(kinds: list[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the layers to keep and, for each layer, the place of the one that stands for it."""
    first = {kind: kinds.index(kind) for kind in kinds}
    last = {kind: i for i, kind in enumerate(kinds)}
    ordered = sorted({*first.values(), *last.values()})
    standing = (i if i == first[kind] else last[kind] for i, kind in enumerate(kinds))
    return tuple(ordered), tuple(map(ordered.index, standing))


def _cut_config(config: Any, count: int, chosen: tuple[int, ...]) -> None:
    for name, value in list(vars(config).items()):
        if isinstance(value, (list, tuple)) and len(value) == count:
            setattr(config, name, [value[i] for i in chosen])
    config.num_hidden_layers = len(chosen)
