"""Fit `Polynomial`s through bytes at a few sizes."""

from __future__ import annotations

import numpy as np

from autotune.memory.profile import FEATURES, Array, Polynomial, features

# A fit is exact: sizes are products of batch and lengths. More than this is a mistake.
_TOLERANCE = 1e-3


class UnlikeError(ValueError):
    """The sizes do not lie on one polynomial."""


def points(
    seq_len: int, step: int, batches: tuple[int, ...], *, squares: bool
) -> list[tuple[int, int]]:
    """Return the (batch, local sequence) sizes to trace, one more than the fit needs.

    Args:
        seq_len: the shortest local sequence.
        step: between the lengths.
        batches: of sequences; the last one is for the check alone.
        squares: whether something has the square of the sequence; the check tells if not so.
    """
    lengths = [seq_len + i * step for i in range(3 if squares else 2)]
    return [(b, s) for b in batches[:-1] for s in lengths] + [(batches[-1], seq_len + 3 * step)]


def fit(sizes: list[tuple[int, int]], values: Array, cp: int) -> Array:
    """Fit polynomials through all sizes but the last, and check them on that one.

    Args:
        sizes: (batch, local sequence), of `points`. Where all batches are one, the terms of `b` are
            0, and where there are two lengths, the terms of squares.
        values: bytes, ``[sizes, instants]``.
        cp: ranks of a sequence.

    Returns:
        ``[instants, len(FEATURES)]``.

    Raises:
        UnlikeError: the last size does not lie on the polynomials.
    """
    batch, local = np.array(sizes, float).T
    matrix = features(batch, local * cp, np.full_like(batch, cp))
    left_out = ("b" if batch.max() == 1 else "-", "S" if len(set(local)) == 3 else "-")
    used = [i for i, name in enumerate(FEATURES) if not any(part in name for part in left_out)]
    matrix = matrix[:, used]
    scale = matrix.max(axis=0)
    solved = np.linalg.solve(matrix[:-1] / scale, values[:-1]) / scale[:, None]
    found = np.where(np.abs(solved) * scale[:, None] < 0.01, 0.0, solved)
    error = np.abs(matrix[-1] @ found - values[-1])
    allowed = _TOLERANCE * max(1.0, float(np.abs(values[-1]).max()))
    if float(error.max(initial=0.0)) > allowed:
        raise UnlikeError(
            f"bytes are no polynomial of batch and sequence: off by {error.max():.0f} of "
            f"{np.abs(values[-1]).max():.0f}"
        )
    polynomials: Array = np.zeros((values.shape[1], len(FEATURES)))
    polynomials[:, used] = np.round(found.T, 6)
    return polynomials


def as_polynomial(row: Array) -> Polynomial:
    """Return a polynomial's coefficients as plain numbers."""
    return tuple(float(x) + 0.0 for x in row)
