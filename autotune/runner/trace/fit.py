"""Bytes at a few sizes to polynomials in batch and sequence, and the instants that matter."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from autotune.memory.profile import FEATURES, Instant, Polynomial, features

Array = NDArray[np.float64]

# A fit is exact: the code allocates products of sizes. More than this is a mistake.
_TOLERANCE = 1e-3
_BATCHES = np.array([1, 2, 4, 8, 16, 32, 64, 128])
_LENGTHS = 2.0 ** np.arange(4, 21)
# Bytes a gradient's element can weigh, from none to so much that the last gradient decides.
_WEIGHTS = np.array([0, 1, 2, 4, 6, 8, 16, 1e6])


def points(seq_len: int, step: int, batches: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return the (batch, local sequence) sizes to trace, one more than the fit needs.

    Args:
        seq_len: the shortest local sequence.
        step: between the lengths.
        batches: of sequences; the last one is for the check alone.
    """
    lengths = [seq_len, seq_len + step, seq_len + 2 * step]
    return [(b, s) for b in batches[:-1] for s in lengths] + [(batches[-1], seq_len + 3 * step)]


def fit(sizes: list[tuple[int, int]], values: Array, cp: int) -> Array:
    """Fit polynomials through all sizes but the last, and check them on that one.

    Args:
        sizes: (batch, local sequence). Where all batches are one, the terms of `b` are 0.
        values: bytes, ``[sizes, instants]``.
        cp: ranks of a sequence.

    Returns:
        ``[instants, len(FEATURES)]``.

    Raises:
        ValueError: the last size does not lie on the polynomials.
    """
    batch, local = np.array(sizes, float).T
    matrix = features(batch, local * cp, np.full_like(batch, cp))
    used = [i for i, name in enumerate(FEATURES) if batch.max() > 1 or "b" not in name]
    matrix = matrix[:, used]
    scale = matrix.max(axis=0)
    solved = np.linalg.solve(matrix[:-1] / scale, values[:-1]) / scale[:, None]
    found = np.where(np.abs(solved) * scale[:, None] < 0.01, 0.0, solved)
    error = np.abs(matrix[-1] @ found - values[-1])
    allowed = _TOLERANCE * max(1.0, float(np.abs(values[-1]).max()))
    if float(error.max(initial=0.0)) > allowed:
        raise ValueError(
            f"bytes are no polynomial of batch and sequence: off by {error.max():.0f} of "
            f"{np.abs(values[-1]).max():.0f}"
        )
    polynomials: Array = np.zeros((values.shape[1], len(FEATURES)))
    polynomials[:, used] = np.round(found.T, 6)
    return polynomials


def envelope(
    polynomials: Array, gradients: list[int], operators: list[str], cps: tuple[int, ...]
) -> tuple[Instant, ...]:
    """Return the instants that are a phase's highest for some size and weight of gradients."""
    batch, length, cp = np.meshgrid(_BATCHES, _LENGTHS, np.array(cps), indexing="ij")
    grid = features(batch, length * cp, cp).reshape(-1, len(FEATURES))
    heights = grid @ polynomials.T
    elements = np.array(gradients, float)
    kept: set[int] = set()
    for weight in _WEIGHTS:
        kept.update(np.argmax(heights + weight * elements, axis=1).tolist())
    return tuple(
        Instant(as_polynomial(polynomials[i]), gradients[i], operators[i]) for i in sorted(kept)
    )


def as_polynomial(row: Array) -> Polynomial:
    """Return a polynomial's coefficients as plain numbers."""
    return tuple(float(x) + 0.0 for x in row)
