"""A small Gaussian process on how far measured speed lies from the predicted, in logarithms.

The kernel is a sum over what plans have in common: a share of the error that all plans have (the
machine is faster or slower than thought), one a trait (an engine, a ZeRO stage, recomputation), one
a family, and slopes over the micro batch of each of these. So a measured plan teaches about its
like by as much as they share, which is what partial pooling does in a hierarchical linear model;
Rasmussen and Williams, Gaussian Processes for Machine Learning (2006), sections 2.2 and 5.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autotune.search.candidates import Candidates, Floats, Integers


@dataclass(frozen=True, kw_only=True, slots=True)
class Scales:
    """Standard deviations of each share of the error of log tokens/s."""

    constant: float = 0.7
    """Of all plans alike."""
    constant_slope: float = 0.1
    """The same, for each doubling of the micro batch."""
    trait: float = 0.15
    trait_slope: float = 0.05
    family: float = 0.08
    family_slope: float = 0.03
    rung: float = 0.03
    """A plan's own, that no other has."""

    def times(self, factor: float) -> Scales:
        """Return them scaled, apart from the constant: how far off the machine as a whole is."""
        return Scales(
            constant=self.constant,
            constant_slope=self.constant_slope * factor,
            trait=self.trait * factor,
            trait_slope=self.trait_slope * factor,
            family=self.family * factor,
            family_slope=self.family_slope * factor,
            rung=self.rung * factor,
        )


CHOICES = tuple(Scales().times(factor) for factor in (0.35, 0.6, 1.0, 1.7))
"""What the marginal likelihood chooses among: how good the time model is here."""
LAUNCH_NOISE = 0.02
"""Between launches of one plan; the steps inside a launch do not show it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Observations:
    """What was measured: positions of rungs, and log(measured / predicted) tokens/s."""

    rungs: Integers
    residual: Floats
    noise: Floats
    """Standard deviation of each residual from the steps inside its launch."""
    launch: Integers
    """Number of the launch that measured it: what it has in common with others of the launch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Belief:
    """Mean and standard deviation of log tokens/s of every candidate."""

    mean: Floats
    sd: Floats
    scales: Scales


def believe(
    candidates: Candidates, seen: Observations, choices: Sequence[Scales] = CHOICES
) -> Belief:
    """Return the posterior under the scales of the largest marginal likelihood.

    Costs O(candidates x observations + observations^3) for the chosen scales and the cube alone for
    each other.
    """
    middle = choices[len(choices) // 2]
    if not len(seen.rungs):
        prior = np.sqrt(_variance(candidates, middle))
        return Belief(mean=candidates.log_rate.copy(), sd=prior, scales=middle)
    fits = [_fit(candidates, seen, scales) for scales in choices]
    best = max(range(len(choices)), key=lambda n: fits[n].log_likelihood)
    scales, fit = choices[best], fits[best]
    cross = covariance(candidates, np.arange(len(candidates)), seen.rungs, scales)
    mean = candidates.log_rate + cross @ fit.weights
    explained = np.linalg.solve(fit.cholesky, cross.T)
    variance = _variance(candidates, scales) - np.einsum("ij,ij->j", explained, explained)
    return Belief(mean=mean, sd=np.sqrt(np.maximum(variance, 1e-12)), scales=scales)


def covariance(candidates: Candidates, rows: Integers, columns: Integers, scales: Scales) -> Floats:
    """Return the prior covariance of log tokens/s between rungs, shape (rows, columns)."""
    slope = candidates.log2_micro_batch[rows, None] * candidates.log2_micro_batch[None, columns]
    total = scales.constant**2 + scales.constant_slope**2 * slope
    for trait in range(candidates.groups.shape[1]):
        alike = candidates.groups[rows, None, trait] == candidates.groups[None, columns, trait]
        total = total + alike * (scales.trait**2 + scales.trait_slope**2 * slope)
    same = candidates.family[rows, None] == candidates.family[None, columns]
    total = total + same * (scales.family**2 + scales.family_slope**2 * slope)
    own: Floats = total + (rows[:, None] == columns[None, :]) * scales.rung**2
    return own


def _variance(candidates: Candidates, scales: Scales) -> Floats:
    """Return the diagonal of `covariance`."""
    slope = candidates.log2_micro_batch**2
    num_traits = candidates.groups.shape[1]
    level = scales.constant**2 + num_traits * scales.trait**2 + scales.family**2 + scales.rung**2
    slopes = scales.constant_slope**2 + num_traits * scales.trait_slope**2 + scales.family_slope**2
    variance: Floats = level + slopes * slope
    return variance


@dataclass(frozen=True, kw_only=True, slots=True)
class _Fit:
    cholesky: Floats
    weights: Floats
    log_likelihood: float


def _fit(candidates: Candidates, seen: Observations, scales: Scales) -> _Fit:
    between = covariance(candidates, seen.rungs, seen.rungs, scales)
    between = between + np.diag(seen.noise**2)
    between = between + LAUNCH_NOISE**2 * (seen.launch[:, None] == seen.launch[None, :])
    cholesky = np.linalg.cholesky(between)
    weights = np.linalg.solve(cholesky.T, np.linalg.solve(cholesky, seen.residual))
    likelihood = -0.5 * seen.residual @ weights - np.log(np.diag(cholesky)).sum()
    return _Fit(cholesky=cholesky, weights=weights, log_likelihood=float(likelihood))
