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


CHOICES = tuple(Scales().times(factor) for factor in (0.4, 0.8, 1.5, 2.5))
"""How good the time model may be here: from calibrated on this machine to formulas alone."""
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
    weights: Floats
    """Of the choices of scales; they sum to 1."""


def believe(
    candidates: Candidates, seen: Observations, choices: Sequence[Scales] = CHOICES
) -> Belief:
    """Return the posterior, averaged over the scales by their marginal likelihood.

    Few trials say little of how large errors are; the most likely scales alone would be too sure.
    Costs O(choices x (candidates x observations^2 + observations^3)).
    """
    if not len(seen.rungs):
        variance = np.mean([_variance(candidates, scales) for scales in choices], axis=0)
        weight = np.full(len(choices), 1 / len(choices))
        return Belief(mean=candidates.log_rate.copy(), sd=np.sqrt(variance), weights=weight)
    found = [_posterior(candidates, seen, scales) for scales in choices]
    likelihood = np.array([one[2] for one in found])
    weight = np.exp(likelihood - likelihood.max())
    weight /= weight.sum()
    means, variances = np.array([one[0] for one in found]), np.array([one[1] for one in found])
    mean = weight @ means
    variance = weight @ (variances + (means - mean) ** 2)
    return Belief(mean=mean, sd=np.sqrt(np.maximum(variance, 1e-12)), weights=weight)


def _posterior(
    candidates: Candidates, seen: Observations, scales: Scales
) -> tuple[Floats, Floats, float]:
    """Return mean and variance of every candidate, and the log marginal likelihood."""
    between = covariance(candidates, seen.rungs, seen.rungs, scales)
    between = between + np.diag(seen.noise**2)
    between = between + LAUNCH_NOISE**2 * (seen.launch[:, None] == seen.launch[None, :])
    cholesky = np.linalg.cholesky(between)
    cross = covariance(candidates, np.arange(len(candidates)), seen.rungs, scales)
    whitened = np.linalg.solve(cholesky, np.column_stack([seen.residual, cross.T]))
    residual, explained = whitened[:, 0], whitened[:, 1:]
    mean = candidates.log_rate + residual @ explained
    variance = _variance(candidates, scales) - np.einsum("ij,ij->j", explained, explained)
    likelihood = -0.5 * residual @ residual - np.log(np.diag(cholesky)).sum()
    return mean, np.maximum(variance, 0.0), float(likelihood)


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
