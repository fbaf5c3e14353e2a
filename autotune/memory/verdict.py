"""Whether an estimate fits, with a probability."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from autotune.memory.estimate import MemoryEstimate
from autotune.memory.peak import Peak
from autotune.memory.residuals import Residual, Residuals, engine_label
from autotune.memory.student import Array, student_cdf
from autotune.memory.table import MemoryTable
from autotune.spec.hardware import HardwareSpec

# Bounds on the probability of fitting.
_FITS, _OOM = 0.9, 0.1

HOST_RESIDUAL = Residual(source="assumed", count=0, bias=0.0, scale=0.1, degrees=4.0)
"""Of host memory: trials do not measure it yet."""


class Verdict(StrEnum):
    """What the estimate says about fitting."""

    FITS = "fits"
    AT_RISK = "at_risk"
    """The error of the estimate does not decide it."""
    OOM = "oom"


def fit_probability(memory: Peak | MemoryEstimate, hardware: HardwareSpec) -> float:
    """Return the chance that device and host memory both suffice, saving the weights included.

    What a trial measures varies by the estimate's residual; the CUDA context is taken as stated.
    The smaller of the two chances counts: what makes one too small makes the other so as well.
    """
    peak = memory.peak if isinstance(memory, MemoryEstimate) else memory
    free = hardware.gpu.memory_bytes - peak.framework_bytes
    chance = peak.residual.chance_below(free / peak.measurable_bytes)
    host = peak.node_host_bytes(hardware.gpus_per_node)
    if host:
        chance = min(chance, HOST_RESIDUAL.chance_below(hardware.host_memory_bytes / host))
    return chance


def verdict(probability: float) -> Verdict:
    """Name a probability of fitting."""
    if probability >= _FITS:
        return Verdict.FITS
    return Verdict.OOM if probability <= _OOM else Verdict.AT_RISK


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Judged:
    """A table of plans with the chance of each to fit."""

    table: MemoryTable
    fit_probability: Array
    bias: Array
    scale: Array
    degrees: Array
    residuals: Residuals

    def peak(self, position: int) -> Peak:
        """Return one plan's peak as an object."""
        table = self.table
        residual = Residual(
            source=self.residuals.source,
            count=self.residuals.count,
            bias=float(self.bias[position]),
            scale=float(self.scale[position]),
            degrees=float(self.degrees[position]),
        )
        return Peak(
            total_bytes=round(float(table.total_bytes[position])),
            framework_bytes=round(float(table.framework_bytes[position])),
            host_bytes=round(float(table.host_bytes[position])),
            gather_host_bytes=round(float(table.gather_host_bytes[position])),
            residual=residual,
        )


def judge_table(
    table: MemoryTable, hardware: HardwareSpec, residuals: Residuals, model: str
) -> Judged:
    """Return what `fit_probability` says of each plan of a table; `model` is its `model_key`."""
    measurable = table.total_bytes - table.framework_bytes
    labels = [engine_label(plan) for plan in table.columns.layouts]
    recompute = [str(plan.recompute) for plan in table.columns.layouts]
    bias, scale, degrees = residuals.predict_columns(
        labels, recompute, table.columns.layout, model, measurable
    )
    free = np.maximum(hardware.gpu.memory_bytes - table.framework_bytes, 1e-300)
    chance = student_cdf((np.log(free / measurable) - bias) / scale, degrees)
    host = table.host_bytes * hardware.gpus_per_node + table.gather_host_bytes
    with np.errstate(divide="ignore"):
        room = np.log(hardware.host_memory_bytes / host)
    enough = student_cdf(room / HOST_RESIDUAL.scale, HOST_RESIDUAL.degrees)
    return Judged(
        table=table,
        fit_probability=np.where(host > 0, np.minimum(chance, enough), chance),
        bias=bias,
        scale=scale,
        degrees=degrees,
        residuals=residuals,
    )
