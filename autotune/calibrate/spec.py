"""What a sweep's ranks are asked for (`SweepSpec`) and what each answers (`SweepAnswer`)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from autotune.spec.workload import Precision
from autotune.timing.calibration import (
    CollectiveCurve,
    EngineTimes,
    MatmulPoint,
    ModelTimes,
    OptimizerTimes,
)

SPEC_FILE = "sweep.json"


class SweptModel(BaseModel):
    """The model whose passes and engines are measured."""

    model_config = ConfigDict(extra="forbid")

    name: str
    key: str
    """Of `memory.knowledge.model_key`."""
    config: dict[str, Any]
    """The Hugging Face config."""
    depths: tuple[int, int]
    """Layers at which it is measured."""


class SweepSpec(BaseModel):
    """One sweep."""

    model_config = ConfigDict(extra="forbid")

    device: Literal["cpu", "cuda"]
    num_ranks: int = Field(ge=1)
    precisions: tuple[Precision, ...]
    packing: bool = True
    model: SweptModel | None = None
    sizes: tuple[tuple[int, int], ...] = ()
    """Micro-batches of the model's passes: sequences and their length."""
    shapes: tuple[tuple[int, int], ...] = ()
    """Inputs and outputs of matrix products beside the usual ones: the model's."""
    strategies: tuple[dict[str, Any], ...] = ()
    """`Plan.to_dict` of each engine to try."""
    item_s: float = Field(default=0.12, gt=0)
    """About how long one point is measured."""
    folder: str


class SweepAnswer(BaseModel):
    """What one rank measured; the slowest rank's times count."""

    model_config = ConfigDict(extra="forbid")

    rank: int
    collectives: list[CollectiveCurve] = []
    matmuls: list[MatmulPoint] = []
    copy_bytes_per_s: float | None = None
    elementwise_bytes_per_s: float | None = None
    to_host_bytes_per_s: float | None = None
    from_host_bytes_per_s: float | None = None
    host_bytes_per_s: float | None = None
    optimizer: list[OptimizerTimes] = []
    models: list[ModelTimes] = []
    engines: list[EngineTimes] = []
    notes: list[str] = []
    """What could not be measured, and why."""


def answer_file(rank: int, part: str) -> str:
    """Return the name of the file in which a rank answers one part of a sweep."""
    return f"sweep-{part}-rank-{rank}.json"
