"""Student's t distribution on arrays, without scipy (the base install has none).

Wallace's transformation ("Bounds on normal approximations to Student's and the chi-square
distributions", Annals of Mathematical Statistics 30, 1959) maps t to a normal deviate and back; its
quantiles are within 0.4% of the tables from 3 degrees of freedom on, between 1% and 99%.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

NORMAL_95 = 1.6448536269514722


def normal_cdf(z: Any) -> Array:
    """Return the normal distribution function; Abramowitz and Stegun 7.1.26, within 1.5e-7."""
    x = np.abs(np.asarray(z, float)) / math.sqrt(2)
    t = 1 / (1 + 0.3275911 * x)
    series = t * (
        0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))
    )
    upper = series * np.exp(-(x**2)) / 2
    return np.asarray(np.where(np.asarray(z) > 0, 1 - upper, upper))


def normal_hazard(z: Any) -> Array:
    """Return density over upper tail; the tail's own expansion where it gets too thin to divide."""
    z = np.asarray(z, float)
    near = np.minimum(z, 4.0)
    density = np.exp(-(near**2) / 2) / math.sqrt(2 * math.pi)
    far = np.maximum(z, 4.0)
    return np.asarray(np.where(z < 4, density / (1 - normal_cdf(near)), far + 1 / far))


def student_cdf(t: Any, degrees: Any) -> Array:
    """Return P(T <= t) for `degrees` of freedom; numbers or arrays."""
    t, degrees = np.asarray(t, float), np.asarray(degrees, float)
    deviate = np.sqrt(degrees * np.log1p(t**2 / degrees)) / _stretch(degrees)
    return normal_cdf(np.copysign(deviate, t))


def student_quantile_95(degrees: Any) -> Array:
    """Return the 95% point: a 90% interval reaches so many scales to either side."""
    degrees = np.asarray(degrees, float)
    deviate = NORMAL_95 * _stretch(degrees)
    return np.asarray(np.sqrt(degrees * np.expm1(deviate**2 / degrees)))


def _stretch(degrees: Array) -> Array:
    return np.asarray((8 * degrees + 3) / (8 * degrees + 1))
