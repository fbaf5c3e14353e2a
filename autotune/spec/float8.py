"""Which projections of a model run in 8-bit floats where a workload says `fp8`."""

from __future__ import annotations

from autotune.spec.model import ModelSpec

STEP = 16
"""Sides of a weight, and tokens of a micro-batch on GPUs, are multiples of it (``torch._scaled_mm``
takes no others)."""


def float8_counts(model: ModelSpec) -> list[tuple[int, int]]:
    """Return, by place in `ModelSpec.projections`, how many of a shape are in float8.

    The layers' linear modules but the first of the model, which accelerate leaves as it is, with
    the output head (``accelerate/utils/ao.py``, ``find_first_last_linear_layers``). Experts are
    stacked parameters and no modules: they stay as well.
    """
    found = []
    for place, (shape, count) in enumerate(model.projections):
        left = count - 1 if place == 0 else count
        if left and not any(side % STEP for side in shape):
            found.append((place, left))
    return found


def num_float8_projections(model: ModelSpec) -> int:
    """Return how many projections of a model are in float8."""
    return sum(count for _, count in float8_counts(model))
