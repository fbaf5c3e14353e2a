"""`TimeResidual`: how far measured step times lie from the predicted, learned from finished trials.

``log(measured / predicted)`` is a sum of effects: of every run alike, of the engine, of its
recomputation, of sequence parallelism, of the micro-batch and of accumulation (both in powers of
two), and of the two together with the engine. Each effect has a normal prior around 0, so the
answer is the closed form of Bayesian linear regression (Bishop, "Pattern Recognition and Machine
Learning", section 3.3): without data nothing moves, one trial moves its own kind most and the
others by what they share (partial pooling), and what was never tried keeps its spread.

A search begins with what trials of earlier studies on its machine say here
(`autotune.search.learning`). Its own trials are learned by its sampler, whose Gaussian process is
fitted anew after each (`autotune.search.gaussian_process`); here as well, they would count twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autotune.plan import CpBackend, Plan, Recompute
from autotune.timing.calibration import engine_kind

Array = NDArray[np.float64]

_SHARED, _ENGINE, _RECOMPUTE, _CP, _SIZE, _SLOPE = 0.30, 0.15, 0.08, 0.10, 0.04, 0.04
"""Prior standard deviations: of all runs, an engine, recomputation, sequence parallelism, each
doubling of batch or accumulation, and the same for one engine."""
_NOISE = 0.03
"""Of one trial: a median of steps, launch to launch."""
_CHUNK = 4096
"""Plans worked on at once."""
_EARLIER = 2.0
"""An earlier study's trial counts as one with so many times the noise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeRow:
    """A finished trial."""

    plan: Plan
    predicted_s: float
    measured_s: float
    here: bool = True
    """Of the study under way; False: of an earlier one on this machine."""

    @property
    def log_ratio(self) -> float:
        """log(measured / predicted)."""
        return math.log(self.measured_s / self.predicted_s)


class TimeResidual:
    """Corrections of predicted step times, fitted to all trials it was told of.

    The prediction it corrects must be the one it learned with: of one calibration.
    """

    def __init__(self, earlier: Sequence[TimeRow] = ()) -> None:
        self._rows: dict[str, TimeRow] = {}
        self._earlier = [row for row in earlier if _usable(row.predicted_s, row.measured_s)]
        self._fitted: _Fit | None = None

    @property
    def count(self) -> int:
        """Trials learned from, earlier studies' included."""
        return len(self._rows) + len(self._earlier)

    def learn(self, plan: Plan, predicted_s: float, measured_s: float) -> None:
        """Take in a finished trial; the same plan again replaces what was known of it.

        Args:
            plan: What ran.
            predicted_s: A step, as `estimate_time` said without any correction.
            measured_s: A step, as the trial measured it; what is not positive and finite is left.
        """
        if not _usable(predicted_s, measured_s):
            return
        self._rows[plan.id] = TimeRow(plan=plan, predicted_s=predicted_s, measured_s=measured_s)
        self._fitted = None

    def predict(self, plans: Sequence[Plan]) -> tuple[Array, Array]:
        """Return what to add to log(predicted) of each plan, and its standard deviation.

        The deviation is of the true mean step time: a trial's own noise is not in it.
        """
        fit = self._fit()
        return fit.predict(plans)

    def corrected_s(self, plans: Sequence[Plan], predicted_s: Array) -> Array:
        """Return the corrected step times of plans."""
        return np.asarray(predicted_s * np.exp(self.predict(plans)[0]), float)

    def _fit(self) -> _Fit:
        if self._fitted is None:
            known = {row.plan.id for row in self._rows.values()}
            earlier = [row for row in self._earlier if row.plan.id not in known]
            self._fitted = _Fit([*self._rows.values(), *earlier])
        return self._fitted


class _Fit:
    """The posterior of the effects, in the form of a kernel over trials."""

    def __init__(self, rows: Sequence[TimeRow]) -> None:
        self._known = _columns([row.plan for row in rows])
        noise = np.array([_NOISE if row.here else _EARLIER * _NOISE for row in rows])
        y = np.array([row.log_ratio for row in rows])
        if not len(rows):
            return
        within = _covariance(self._known, self._known)
        # One trial that was disturbed must not carry the rest: Huber's weights, iterated.
        weights = np.ones(len(y))
        for _ in range(8):
            factor = np.linalg.cholesky(within + np.diag(noise**2 / weights))
            alpha = np.linalg.solve(factor.T, np.linalg.solve(factor, y))
            left = np.abs(y - within @ alpha) / (2.5 * noise)
            weights = 1 / np.maximum(1.0, left)
        self._factor, self._alpha = factor, alpha

    def predict(self, plans: Sequence[Plan]) -> tuple[Array, Array]:
        new = _columns(plans)
        prior = _own_variance(new)
        if not len(self._known):
            return np.zeros(len(plans)), np.sqrt(prior)
        mean, explained = np.zeros(len(plans)), np.zeros(len(plans))
        for start in range(0, len(plans), _CHUNK):
            part = slice(start, start + _CHUNK)
            across = _covariance(new[part], self._known)
            mean[part] = across @ self._alpha
            explained[part] = (np.linalg.solve(self._factor, across.T) ** 2).sum(axis=0)
        return mean, np.sqrt(np.maximum(prior - explained, 1e-8))


_TP_CODE = 1000
"""Above every sequence-parallel degree: tells tensor-parallel degrees apart in one code."""
_KINDS: dict[str, int] = {}
"""Codes of engines, of this process."""


def _columns(plans: Sequence[Plan]) -> Array:
    """``[plans, 5]``: engine, recomputation, split of the ranks, log2 of batch and steps.

    The first three are codes, compared and nothing else.
    """
    rows = [
        (
            _KINDS.setdefault(engine_kind(plan), len(_KINDS)),
            plan.recompute is Recompute.FULL,
            plan.cp + (plan.cp_backend is CpBackend.RING) / 2 + (plan.tp - 1) * _TP_CODE,
            math.log2(plan.micro_batch_size),
            math.log2(plan.grad_accum_steps),
        )
        for plan in plans
    ]
    return np.array(rows, float).reshape(-1, 5)


def _covariance(a: Array, b: Array) -> Array:
    """``[a, b]``: prior covariance of the effects of two sets of plans."""
    engine, recompute, cp = (a[:, n, None] == b[None, :, n] for n in range(3))
    sizes = a[:, None, 3] * b[None, :, 3] + a[:, None, 4] * b[None, :, 4]
    return np.asarray(
        _SHARED**2
        + _ENGINE**2 * engine
        + _RECOMPUTE**2 * recompute * (0.5 + 0.5 * engine)
        + _CP**2 * cp * (0.5 + 0.5 * engine)
        + _SIZE**2 * sizes
        + _SLOPE**2 * sizes * engine,
        float,
    )


def _own_variance(a: Array) -> Array:
    sizes = a[:, 3] ** 2 + a[:, 4] ** 2
    fixed = _SHARED**2 + _ENGINE**2 + _RECOMPUTE**2 + _CP**2
    return np.asarray(fixed + (_SIZE**2 + _SLOPE**2) * sizes, float)


def _usable(*seconds: float) -> bool:
    return all(math.isfinite(value) and value > 0 for value in seconds)
