"""`Counted`: parameters of a model by where they stand, counted in the model itself.

For families whose code `autotune.spec.model.families` does not describe: transformers builds the
model without weights in a child process, which answers with these numbers.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt


class Projection(BaseModel):
    """Linear modules at one place of the decoder layers, of one shape."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    """Inside its layer, such as ``self_attn.q_proj``."""
    inputs: PositiveInt
    outputs: PositiveInt
    count: PositiveInt
    """Layers that have it."""

    @property
    def name(self) -> str:
        """What an adapter calls it."""
        return self.path.rsplit(".", 1)[-1]


class Counted(BaseModel):
    """Elements of distinct parameters."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    causal_lm: str
    """The class transformers builds."""
    total: PositiveInt
    active: PositiveInt
    """Those one token passes through: of stacked experts the chosen ones."""
    embedding: PositiveInt
    """Of the tokens."""
    head: NonNegativeInt
    """The output head's own; 0 when it is the embedding's."""
    rest: NonNegativeInt
    """Outside the layers, but for embedding and head: final norm, learned positions."""
    layers: tuple[PositiveInt, ...]
    """Each layer's, first to last."""
    matrices: tuple[NonNegativeInt, ...]
    """Each layer's in parameters of two dimensions and more."""
    active_matrices: NonNegativeInt
    """Of all layers' `matrices`, those one token multiplies with."""
    sizes: dict[int, PositiveInt]
    """How many parameters of the layers have each number of elements."""
    largest_module: PositiveInt
    """Of the layers' modules with parameters of their own."""
    projections: tuple[Projection, ...]
    attributes: dict[str, Any]
    """Values of the `ModelSpec` fields of these names, as transformers reads the config."""
