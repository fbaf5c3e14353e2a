"""`Calibration`: what a sweep of one machine measured, and how a prediction reads it.

Every number in it was measured, by all ranks at the same time; nothing is filled in. What it lacks
is predicted by formula. `autotune.calibrate` makes and keeps it.
"""

from __future__ import annotations

from enum import StrEnum
from functools import cached_property
from typing import Annotated, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from autotune.memory.layers import Regime
from autotune.plan import Engine, Plan
from autotune.spec.workload import Precision, Workload
from autotune.timing.passes import Passes, fit_passes, nonnegative_fit

Array = NDArray[np.float64]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
SCHEMA_VERSION: Final = 1


class Collective(StrEnum):
    """Operations between ranks."""

    ALL_REDUCE = "all_reduce"
    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_TO_ALL = "all_to_all"
    POINT_TO_POINT = "point_to_point"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class CollectiveCurve(_Part):
    """One operation of one group, by size."""

    kind: Collective
    ranks: int = Field(ge=2)
    stride: int = Field(default=1, ge=1)
    """Distance between neighbouring ranks of the group."""
    num_bytes: tuple[float, ...] = Field(min_length=1)
    """Of the whole data (`Links.seconds`), ascending."""
    times_s: tuple[Seconds, ...] = Field(min_length=1)

    def seconds(self, num_bytes: Any) -> Array:
        """Interpolate between measured sizes, both in logarithms.

        Below the smallest its time holds (latency), above the largest its rate.
        """
        size = np.maximum(np.asarray(num_bytes, float), 1.0)
        known, times = np.array(self.num_bytes), np.array(self.times_s)
        # A larger message takes no less time: what says otherwise is noise.
        times = np.maximum.accumulate(times)
        inside = np.exp(np.interp(np.log(size), np.log(known), np.log(times)))
        return np.asarray(np.where(size > known[-1], times[-1] * size / known[-1], inside), float)


class MatmulPoint(_Part):
    """One matrix product, ``[rows, inputs] x [inputs, outputs]``."""

    precision: Precision
    rows: int = Field(ge=1)
    inputs: int = Field(ge=1)
    outputs: int = Field(ge=1)
    seconds: Seconds

    @property
    def flops_per_s(self) -> float:
        """Rate it reached."""
        return 2 * self.rows * self.inputs * self.outputs / self.seconds


class PassPoint(_Part):
    """Forward and backward of the real model, some layers deep, on one micro-batch."""

    layers: int = Field(ge=1)
    micro_batch_size: int = Field(ge=1)
    seq_len: int = Field(ge=1)
    forward_s: Seconds
    backward_s: Seconds
    recompute_backward_s: Seconds | None = None
    """The backward when each layer is recomputed in it."""


class ModelTimes(_Part):
    """The passes of one model at two depths: its layers' time is their difference."""

    model: str
    """Of `memory.knowledge.model_key`."""
    regime: Regime
    packing: bool
    points: tuple[PassPoint, ...] = Field(min_length=2)

    @cached_property
    def passes(self) -> Passes:
        """The curves through the points."""
        return fit_passes(
            np.array([p.layers for p in self.points], float),
            np.array([p.micro_batch_size * p.seq_len for p in self.points], float),
            np.array([p.seq_len for p in self.points], float),
            np.array([p.forward_s for p in self.points]),
            np.array([p.backward_s for p in self.points]),
            np.array([p.recompute_backward_s or np.nan for p in self.points]),
        )


class OptimizerTimes(_Part):
    """One AdamW step on plain tensors, clipping before it and zeroing after."""

    tensors: int = Field(ge=1)
    elements: int = Field(ge=1)
    """Of all tensors together, on one rank."""
    seconds: Seconds


class EnginePoint(_Part):
    """A real trial of an engine, some layers deep, at one micro-batch: whole optimizer steps."""

    layers: int = Field(ge=1)
    micro_batch_size: int = Field(ge=1)
    seq_len: int = Field(ge=1)
    step_s: Seconds
    """At accumulation 1."""
    step_twice_s: Seconds
    """At accumulation 2."""


class EngineTimes(_Part):
    """What one engine takes beyond the model's passes, on ranks where nothing overlaps."""

    model: str
    """Of `memory.knowledge.model_key`."""
    precision: Precision
    packing: bool
    strategy: str
    """Of `engine_kind`, with `EXCHANGED` behind it where sequences were split."""
    num_ranks: int = Field(ge=1)
    points: tuple[EnginePoint, ...] = Field(min_length=1)


class Calibration(_Part):
    """Rates of one machine, measured by `num_ranks` ranks at the same time."""

    schema_version: Literal[1] = SCHEMA_VERSION
    device: Literal["cpu", "cuda"]
    num_ranks: int = Field(ge=1)
    threads: int = Field(ge=1)
    """Of each rank."""
    fingerprint: dict[str, str | int]
    recorded_at: str
    """ISO 8601, UTC."""
    duration_s: float
    collectives: tuple[CollectiveCurve, ...] = ()
    matmuls: tuple[MatmulPoint, ...] = ()
    copy_bytes_per_s: Seconds | None = None
    """Bytes read and written by a large copy."""
    elementwise_bytes_per_s: Seconds | None = None
    """Of a sum of two large tensors into a third."""
    to_host_bytes_per_s: Seconds | None = None
    from_host_bytes_per_s: Seconds | None = None
    host_bytes_per_s: Seconds | None = None
    """Of a rank's elementwise work on host memory, which CPU Adam is; CUDA alone."""
    optimizer: tuple[OptimizerTimes, ...] = ()
    models: tuple[ModelTimes, ...] = ()
    engines: tuple[EngineTimes, ...] = ()

    def collective(self, kind: Collective, ranks: int, stride: int) -> CollectiveCurve | None:
        """Return the curve of a group, else that of the nearest group, else None."""
        curves = [c for c in self.collectives if c.kind is kind]
        return min(
            curves,
            key=lambda c: (abs(np.log(c.ranks / ranks)), abs(np.log(c.stride / stride))),
            default=None,
        )

    def matmul_flops_per_s(
        self, precision: Precision, rows: Any, inputs: float, outputs: float
    ) -> Array | None:
        """Return the rate of products of a shape; None when none was measured in the precision.

        The logarithm of the rate is a mean over the measured shapes, each weighed by the inverse
        fourth power of its distance in the logarithms of the three sizes.
        """
        points = [p for p in self.matmuls if p.precision is precision]
        if not points:
            return None
        rates = np.log([p.flops_per_s for p in points])
        shapes = np.log([[p.rows, p.inputs, p.outputs] for p in points])
        rows = np.maximum(np.asarray(rows, float), 1.0)
        # A few row counts stand for all plans of a space.
        distinct, back = np.unique(rows, return_inverse=True)
        place = np.stack(np.broadcast_arrays(np.log(distinct), np.log(inputs), np.log(outputs)), -1)
        distance = ((place[:, None, :] - shapes) ** 2).sum(-1)
        weights = 1 / (distance + 1e-3) ** 2
        found = np.exp((weights * rates).sum(-1) / weights.sum(-1))
        return np.asarray(found[back].reshape(rows.shape), float)

    def passes(self, model: str, regime: Regime, *, packing: bool) -> Passes | None:
        """Return the measured passes of a model; None when it was not swept so."""
        for times in self.models:
            if (times.model, times.regime, times.packing) == (model, regime, packing):
                return times.passes
        return None

    def optimizer_s(self, tensors: Any, elements: Any) -> Array | None:
        """Return AdamW's step: an amount a tensor and an amount an element; None: not measured."""
        if not self.optimizer:
            return None
        sizes = np.array([[p.tensors, p.elements] for p in self.optimizer], float)
        each = nonnegative_fit(sizes, np.array([p.seconds for p in self.optimizer]))
        return np.asarray(each[0] * np.asarray(tensors, float) + each[1] * np.asarray(elements))

    def engine(
        self, model: str, workload: Workload, strategy: str, num_ranks: int
    ) -> EngineTimes | None:
        """Return what was measured of an engine; None: not of this one, or not so many ranks."""
        wanted = (model, workload.precision, workload.packing, strategy, num_ranks)
        for times in self.engines:
            known = (times.model, times.precision, times.packing, times.strategy, times.num_ranks)
            if known == wanted:
                return times
        return None


TRIED_CP = 2
"""The sequence-parallel degree an engine is tried with."""
EXCHANGED = "-cp"
"""After an `engine_kind`: tried with sequences split over `TRIED_CP` ranks."""


def has_measured_passes(workload: Workload) -> bool:
    """Say whether the passes that are measured are this workload's: full, in the compute type."""
    return workload.adapter is None and not workload.fp8


def engine_kind(plan: Plan) -> str:
    """Return what tells plans apart that communicate differently, such as ``zero3-offload``.

    Batches, recomputation and sequence parallelism are left out.
    """
    kind = f"zero{plan.zero_stage}" if plan.engine is Engine.DEEPSPEED else str(plan.engine)
    if plan.engine is Engine.FSDP2:
        kind += "" if plan.reshard_after_forward else "-kept"
        kind += "-hybrid" if plan.dp_replicate > 1 else ""
    if plan.offload_params:
        return f"{kind}-offload-all"
    return f"{kind}-offload" if plan.offload_optimizer else kind
