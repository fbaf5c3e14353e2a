"""`Sizes`: how many elements stand where in a model, for engines that treat parameters by size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autotune.memory.profile import ActivationProfile
from autotune.spec.model import ModelSpec
from autotune.spec.workload import Lora

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Sizes:
    """Elements of parameters, frozen ones among them where it is not said otherwise."""

    embedding: float
    head: float
    """The output head's own; 0 when it is the embedding's."""
    norm: float
    """The final norm, and what else is outside layers, embedding and head."""
    layers: Array
    """``[num_layers]``."""
    layers_trainable: Array
    """``[num_layers]``."""
    root_trainable: float
    """Of embedding, head and final norm; 0 under an adapter."""
    module: float
    """Of the layers' largest module with parameters of its own: a projection, or all experts."""
    parameters: tuple[int, ...]
    """Distinct sizes of the trainable parameters of all layers, descending."""
    counts: tuple[int, ...]
    """How many parameters there are of each size."""

    @property
    def tied(self) -> bool:
        """Whether the head multiplies with the embedding."""
        return self.head == 0

    @property
    def root(self) -> float:
        """Outside the layers."""
        return self.embedding + self.head + self.norm

    @property
    def total(self) -> float:
        """All."""
        return float(self.root + self.layers.sum())

    @property
    def trainable(self) -> float:
        """Trained."""
        return float(self.root_trainable + self.layers_trainable.sum())

    @property
    def all_train(self) -> bool:
        """Whether there is no adapter."""
        return self.root_trainable > 0

    @property
    def largest_layer_parameter(self) -> float:
        """Of the trained ones."""
        return float(self.parameters[0])

    @property
    def largest_trainable(self) -> float:
        """Of the trained parameters, embedding and head among them."""
        return max(self.embedding * self.all_train, self.largest_layer_parameter)

    def share_above(self, elements: Any) -> Array:
        """Return the share of the layers' trained elements in parameters above a size."""
        limit = np.asarray(elements, float)
        above = sum(
            (size * count * (size > limit) for size, count in self._sizes()), np.zeros(limit.shape)
        )
        return np.asarray(above / max(1.0, float(self.layers_trainable.sum())))

    def _sizes(self) -> list[tuple[int, int]]:
        return list(zip(self.parameters, self.counts, strict=True))


def sizes_of(model: ModelSpec, profile: ActivationProfile, adapter: Lora | None) -> Sizes:
    """Count a model's parameters: the layers' as the profile says, single ones by their shapes."""
    root, head = model.num_root_parameters, _head(model)
    kinds = [profile.kinds[i] for i in profile.layers]
    single = _trained(model, adapter)
    sizes = sorted(single, reverse=True)
    return Sizes(
        embedding=model.num_embedding_parameters,
        head=head,
        norm=root - model.num_embedding_parameters - head,
        layers=np.array([kind.parameter_elements for kind in kinds], float),
        layers_trainable=np.array([kind.trainable_elements for kind in kinds], float),
        root_trainable=0 if adapter else root,
        module=_largest_module(model),
        parameters=tuple(sizes),
        counts=tuple(single[size] for size in sizes),
    )


def _head(model: ModelSpec) -> int:
    if model.counted:
        return model.counted.head
    return 0 if model.tied_embeddings else model.num_embedding_parameters


def _largest_module(model: ModelSpec) -> int:
    if model.counted:
        return model.counted.largest_module
    experts = model.moe.num_experts * model.num_expert_parameters if model.moe else 0
    ffn = model.ffn_linears if model.num_dense_layers else {}
    return max(experts, *(a * b for a, b in (model.attention_linears | ffn).values()))


def _trained(model: ModelSpec, adapter: Lora | None) -> dict[int, int]:
    """Return how many trained parameters of the layers have each size."""
    if adapter is not None and model.counted:
        own = [p for p in model.counted.projections if p.name in adapter.target_modules]
        pairs = [(adapter.r * side, p.count) for p in own for side in (p.inputs, p.outputs)]
        return _count(pairs) or {1: 1}
    if adapter is not None:
        shapes = [s for name, s in model.linears.items() if name in adapter.target_modules]
        sides = [adapter.r * side for shape in shapes for side in shape]
        return _count((side, model.num_layers) for side in sides) or {1: 1}
    if model.counted:
        return dict(model.counted.sizes)
    dense = [a * b for a, b in model.ffn_linears.values()] if model.num_dense_layers else []
    found = [(a * b, model.num_layers) for a, b in model.attention_linears.values()]
    found += [(size, model.num_dense_layers) for size in dense]
    found += [(model.hidden_size, model.num_layers * model.norms_per_layer)]
    if model.moe:
        products = model.moe.num_experts * model.hidden_size * model.moe.expert_ffn_size
        found += [(2 * products, model.num_moe_layers), (products, model.num_moe_layers)]
        found += [(model.num_router_parameters, model.num_moe_layers)]
    return _count(found)


def _count(found: Any) -> dict[int, int]:
    counts: dict[int, int] = {}
    for size, count in found:
        counts[size] = counts.get(size, 0) + count
    return counts
