"""Whether an estimate fits, with a probability."""

from __future__ import annotations

from enum import StrEnum

from autotune.memory.estimate import MemoryEstimate
from autotune.memory.residuals import Residual
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


def fit_probability(memory: MemoryEstimate, hardware: HardwareSpec) -> float:
    """Return the chance that device and host memory both suffice.

    What a trial measures varies by the estimate's residual; the CUDA context is taken as stated.
    The smaller of the two chances counts: what makes one too small makes the other so as well.
    """
    free = hardware.gpu.memory_bytes - memory.framework_bytes
    chance = memory.residual.chance_below(free / memory.measurable_bytes)
    host = memory.host_bytes * hardware.gpus_per_node
    if host:
        chance = min(chance, HOST_RESIDUAL.chance_below(hardware.host_memory_bytes / host))
    return chance


def verdict(probability: float) -> Verdict:
    """Name a probability of fitting."""
    if probability >= _FITS:
        return Verdict.FITS
    return Verdict.OOM if probability <= _OOM else Verdict.AT_RISK
