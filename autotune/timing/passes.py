"""`Passes`: seconds of a model's forward and backward, from the real model at two depths.

Two depths differ by whole layers: their difference is the layers' time, what is left is the time of
embedding, head and loss (depth differencing, as Galvatron's profiler does it: Miao et al.,
arXiv:2211.13878). Both are curves of the tokens ``T`` of a micro-batch and of ``T S``, which the
attention's scores grow with.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Curve:
    """A sum of terms with positive weights, corrected where it was measured."""

    weights: Array
    """Of 1, of ``T`` and of ``T S``."""
    log_tokens: Array
    """Where it was measured, ascending."""
    log_ratios: Array
    """log(measured / sum of the terms) there; between them interpolated, beyond them as at the
    nearest."""

    def seconds(self, tokens: Any, seq_len: Any) -> Array:
        """Return the seconds of one micro-batch; `tokens` of one rank, `seq_len` whole."""
        tokens = np.asarray(tokens, float)
        fitted = _terms(tokens, seq_len) @ self.weights
        ratio = np.interp(np.log(tokens), self.log_tokens, self.log_ratios)
        return np.asarray(fitted * np.exp(ratio), float)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Passes:
    """Curves of one layer and of what a model has once."""

    layer_forward: Curve
    layer_backward: Curve
    layer_recompute: Curve | None
    """What recomputation adds to a layer's backward; None when it was not measured."""
    fixed_forward: Curve
    fixed_backward: Curve

    def seconds(self, layers: int, tokens: float, seq_len: float) -> float:
        """Return forward and backward of one micro-batch, without recomputation."""
        each = self.layer_forward.seconds(tokens, seq_len) + self.layer_backward.seconds(
            tokens, seq_len
        )
        fixed = self.fixed_forward.seconds(tokens, seq_len) + self.fixed_backward.seconds(
            tokens, seq_len
        )
        return float(layers * each + fixed)


def fit_passes(
    layers: Array,
    tokens: Array,
    seq_lens: Array,
    forward: Array,
    backward: Array,
    recompute_backward: Array,
) -> Passes:
    """Difference the depths at each size and lay curves through the results.

    Args:
        layers: ``[points]``, of two different depths at each size.
        tokens: ``[points]``, of the micro-batch.
        seq_lens: ``[points]``.
        forward: ``[points]``, seconds.
        backward: ``[points]``, seconds.
        recompute_backward: ``[points]``, seconds; NaN where it was not measured.

    Raises:
        ValueError: no size was measured at two depths.
    """
    sizes: list[tuple[float, float]] = []
    layer_f: list[float] = []
    layer_b: list[float] = []
    layer_r: list[float] = []
    fixed_f: list[float] = []
    fixed_b: list[float] = []
    for size in sorted(set(zip(tokens, seq_lens, strict=True))):
        at = (tokens == size[0]) & (seq_lens == size[1])
        low, high = layers[at].argmin(), layers[at].argmax()
        depth = layers[at][high] - layers[at][low]
        if depth <= 0:
            continue
        sizes.append(size)
        for values, each, fixed in ((forward, layer_f, fixed_f), (backward, layer_b, fixed_b)):
            slope = (values[at][high] - values[at][low]) / depth
            # Noise must not leave a layer or the rest without any time.
            slope = max(slope, 0.02 * values[at][high] / layers[at][high])
            each.append(slope)
            fixed.append(max(values[at][high] - slope * layers[at][high], 1e-3 * slope))
        more = recompute_backward[at][high] - backward[at][high]
        layer_r.append(max(more / layers[at][high], 0.1 * layer_f[-1]))
    if not sizes:
        raise ValueError("no size was measured at two depths")
    places = np.array(sizes)
    recompute = np.array(layer_r)
    known = np.isfinite(recompute)
    return Passes(
        layer_forward=_curve(places, np.array(layer_f)),
        layer_backward=_curve(places, np.array(layer_b)),
        layer_recompute=_curve(places[known], recompute[known]) if known.any() else None,
        fixed_forward=_curve(places, np.array(fixed_f)),
        fixed_backward=_curve(places, np.array(fixed_b)),
    )


def nonnegative_fit(terms: Array, values: Array) -> Array:
    """Return weights of at least 0 that fit values best by relative error.

    With so few terms every subset of them is tried: the best least-squares fit without a negative
    weight is the answer.

    Args:
        terms: ``[points, terms]``, none negative.
        values: ``[points]``, all positive.
    """
    count = terms.shape[1]
    scaled = terms / values[:, None]
    best, lowest = np.zeros(count), np.inf
    for number in range(1, min(count, len(values)) + 1):
        for chosen in combinations(range(count), number):
            weights, *_ = np.linalg.lstsq(scaled[:, chosen], np.ones(len(values)), rcond=None)
            error = float(((scaled[:, chosen] @ weights - 1) ** 2).sum())
            # A term more must earn its place: rounding alone would always add one.
            if weights.min() >= 0 and error < lowest - 1e-9:
                best, lowest = np.zeros(count), error
                best[list(chosen)] = weights
    return best


def _terms(tokens: Any, seq_len: Any) -> Array:
    tokens = np.asarray(tokens, float)
    return np.stack(np.broadcast_arrays(np.ones_like(tokens), tokens, tokens * seq_len), -1)


def _curve(places: Array, values: Array) -> Curve:
    terms = _terms(places[:, 0], places[:, 1])
    weights = nonnegative_fit(terms, values)
    ratios = np.log(values / (terms @ weights))
    tokens = np.unique(places[:, 0])
    mean = np.array([ratios[places[:, 0] == each].mean() for each in tokens])
    return Curve(weights=weights, log_tokens=np.log(tokens), log_ratios=mean)
