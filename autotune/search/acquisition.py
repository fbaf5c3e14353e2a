"""Which rung to measure next: the expected improvement a second of what it costs, and when to stop.

A rung of the launch that runs costs its own time alone. A rung of another family costs a launch as
well, so families are compared as bundles: their rungs worth measuring once the launch is paid for.
Expected improvement a unit of cost: Snoek, Larochelle and Adams, Practical Bayesian Optimization
(2012), section 3.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from autotune.search.candidates import Floats, Integers
from autotune.search.gaussian_process import Belief

LEAST_FIT = 0.05
"""A rung with a smaller chance to fit does not keep a search going."""
_OPTIMISM = 1.28
"""Standard deviations above the mean that count as possible: one in ten lies above."""
_OVERLAP = 0.5
"""What a further rung of a bundle adds of its own improvement: rungs of a family rise together."""

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What can be measured, an entry a candidate."""

    open: Flags
    """Not measured and not ruled out."""
    running: Flags
    """Open, and within reach of the launch that runs."""
    fit: Floats
    """Probability to fit."""
    family: Integers
    rung_s: Floats
    launch_s: float


def can_still_win(options: Options, belief: Belief, best: float | None, tolerance: float) -> Flags:
    """Tell which open rungs may beat the best by more than the tolerance.

    Args:
        options: What can be measured.
        belief: Of log tokens/s.
        best: Log tokens/s of the best so far; None before one ran to its end.
        tolerance: Relative gain below which a better configuration is not worth a measurement.
    """
    if best is None:
        return options.open.copy()
    bound = belief.mean + _OPTIMISM * belief.sd
    hopeful: Flags = (
        options.open & (options.fit >= LEAST_FIT) & (bound > best + math.log1p(tolerance))
    )
    return hopeful


def next_rung(options: Options, belief: Belief, best: float | None, hopeful: Flags) -> int:
    """Return the position of the rung to measure next; at least one must be hopeful."""
    if best is None:
        return _first_answer(options, belief, hopeful)
    gain = np.where(hopeful, expected_improvement(belief, best) * options.fit, 0.0)
    rate = gain / options.rung_s
    chosen, best_rate = -1, -1.0
    inside = np.flatnonzero(hopeful & options.running)
    if len(inside):
        # The lowest of those that pay for themselves: a launch cannot go back down.
        own = rate[inside].max()
        chosen, best_rate = int(inside[rate[inside] >= _OVERLAP * own].min()), own
    for family in np.unique(options.family[hopeful & ~options.running]):
        rungs = np.flatnonzero(hopeful & ~options.running & (options.family == family))
        first, bundle_rate = _bundle(rungs, gain, options)
        if bundle_rate > best_rate:
            chosen, best_rate = first, bundle_rate
    return chosen


def expected_improvement(belief: Belief, best: float) -> Floats:
    """Return the expected gain in log tokens/s over the best, of each candidate."""
    z = (belief.mean - best) / belief.sd
    density = np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    gain: Floats = belief.sd * (density + z * _normal_cdf(z))
    return np.maximum(gain, 1e-300)


def _first_answer(options: Options, belief: Belief, hopeful: Flags) -> int:
    """Return the rung of most tokens/s to expect a second of search: without one there is nothing.

    So a safe rung comes before a faster one that may not fit.
    """
    log_gain = belief.mean + np.log(np.maximum(options.fit, 1e-9))
    cost = options.rung_s + np.where(options.running, 0.0, options.launch_s)
    return int(np.argmax(np.where(hopeful, log_gain - np.log(cost), -np.inf)))


def _bundle(rungs: Integers, gain: Floats, options: Options) -> tuple[int, float]:
    """Return the lowest rung of the bundle that gains most a second, and that rate."""
    order = rungs[np.argsort(-gain[rungs] / options.rung_s[rungs], kind="stable")]
    order = np.concatenate([[rungs[np.argmax(gain[rungs])]], order])
    best_rate, total, cost, lowest = -1.0, 0.0, options.launch_s, int(order[0])
    taken: set[int] = set()
    for rung in order:
        if int(rung) in taken:
            continue
        share = 1.0 if not taken else _OVERLAP
        total += share * float(gain[rung])
        cost += float(options.rung_s[rung])
        if total / cost <= best_rate:
            break
        taken.add(int(rung))
        best_rate, lowest = total / cost, min(taken)
    return lowest, best_rate


def _normal_cdf(z: Floats) -> Floats:
    """Return the normal distribution function, by Abramowitz and Stegun 7.1.26 (error 1.5e-7)."""
    x = np.abs(z) / math.sqrt(2)
    t = 1 / (1 + 0.3275911 * x)
    poly = t * (
        0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))
    )
    erf = 1 - poly * np.exp(-(x**2))
    result: Floats = 0.5 * (1 + np.sign(z) * erf)
    return result
