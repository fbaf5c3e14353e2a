"""A frozen base in 4 bits under any engine: what it stores, and what its products copy.

The runner stores the bits in elements of the compute type, so engines shard and gather them as
such, only fewer: see `autotune.runner.quantised`. The scales are no parameters and stay whole on
every rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from autotune.memory import quantised
from autotune.memory.engines.base import Bytes, EngineMemory, Place, Runs, Work
from autotune.memory.setup import Quantised, Setup
from autotune.memory.sizes import Sizes
from autotune.plan import Engine, Plan
from autotune.spec.model import ModelSpec

_PACKED = 0.5
"""Bytes of a weight without its scale."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedBase:
    """The quantised projections of a whole model."""

    elements: float
    """Of the compute type, that hold the bits."""
    scale_bytes: float
    copy_bytes: float
    """The largest matrix a product unpacks, in the compute type."""


def packed_base(model: ModelSpec, kind: Quantised, compute_bytes: int) -> PackedBase:
    """Count a model's projections in 4 bits; embedding, head, norms and experts stay whole."""
    if model.counted:
        shapes = [((p.inputs, p.outputs), p.count) for p in model.counted.projections]
    else:
        shapes = [(shape, model.num_layers) for shape in model.linears.values()]
    weights = sum(count * inputs * outputs for (inputs, outputs), count in shapes)
    stored = sum(
        count * shape[0] * shape[1] * quantised.bytes_per_element(kind, shape)
        for shape, count in shapes
    )
    largest = max((inputs * outputs for (inputs, outputs), _ in shapes), default=0)
    return PackedBase(
        elements=_PACKED * weights / compute_bytes,
        scale_bytes=stored - _PACKED * weights,
        copy_bytes=float(quantised.working_bytes(kind, largest, compute_bytes)),
    )


def packed_sizes(sizes: Sizes, base: PackedBase, compute_bytes: int) -> Sizes:
    """Return the sizes with the quantised projections as the elements that hold them."""
    share = _PACKED / compute_bytes
    gone = base.elements / share * (1 - share)
    per_layer = gone / len(sizes.layers)
    return replace(sizes, layers=sizes.layers - per_layer, module=sizes.module * share)


def with_packed_base(
    kind: type[EngineMemory], sizes: Sizes, runs: Runs, plan: Plan, base: PackedBase
) -> EngineMemory:
    """Return an engine's memory over a packed base; `sizes` are those of `packed_sizes`."""

    class Packed(kind):  # type: ignore[valid-type, misc]
        def resting(self) -> dict[str, Bytes]:
            states: dict[str, Bytes] = dict(super().resting())
            if "parameters" in states:
                states["parameters"] = states["parameters"] + _correction(
                    self.setup, runs, plan, base
                )
            states["parameters"] = states.get("parameters", 0.0) + base.scale_bytes
            return states

        def forward(self, place: Place) -> Work:
            return _unpacking(super().forward(place), place, base)

        def backward(self, place: Place, inside: Bytes, *, later: bool) -> Work:
            return _unpacking(super().backward(place, inside, later=later), place, base)

    return Packed(sizes, runs)


def _correction(setup: Setup, runs: Runs, plan: Plan, base: PackedBase) -> Bytes:
    """DDP and FSDP2 count every stored element in the type of the others, fp32."""
    if plan.engine is Engine.DEEPSPEED:
        return 0.0
    shards = runs.shards if plan.engine is Engine.FSDP2 else 1.0
    return (setup.compute_bytes - setup.parameter_bytes) * base.elements / shards


def _unpacking(work: Work, place: Place, base: PackedBase) -> Work:
    if place.kind != "layer":
        return work
    return work._replace(temporaries=work.temporaries + base.copy_bytes)
