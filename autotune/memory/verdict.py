"""Whether an estimate fits, with a probability."""

from __future__ import annotations

import math
from enum import StrEnum

from autotune.memory.estimate import MemoryEstimate
from autotune.spec.hardware import HardwareSpec

# Bounds on the probability of fitting.
_FITS, _OOM = 0.9, 0.1


class Verdict(StrEnum):
    """What the estimate says about fitting."""

    FITS = "fits"
    AT_RISK = "at_risk"
    """The assumed error of the estimate does not decide it."""
    OOM = "oom"


def fit_probability(memory: MemoryEstimate, hardware: HardwareSpec) -> float:
    """Return the chance that device and host memory both suffice.

    Assumes log(real / predicted) is normal with mean 0 and the estimate's sigma, an assumption that
    is not calibrated yet.
    """
    chance = _chance(hardware.gpu.memory_bytes, memory.total_bytes, memory.relative_sigma)
    host = memory.host_bytes * hardware.gpus_per_node
    if host:
        chance = min(chance, _chance(hardware.host_memory_bytes, host, memory.relative_sigma))
    return chance


def verdict(probability: float) -> Verdict:
    """Name a probability of fitting."""
    if probability >= _FITS:
        return Verdict.FITS
    return Verdict.OOM if probability <= _OOM else Verdict.AT_RISK


def _chance(capacity: int, needed: int, sigma: float) -> float:
    return 0.5 * (1 + math.erf(math.log(capacity / needed) / (sigma * math.sqrt(2))))
