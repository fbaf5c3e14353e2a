"""The instants of a phase that can be its highest."""

from __future__ import annotations

import numpy as np

from autotune.memory.polynomials import as_polynomial
from autotune.memory.profile import FEATURES, Array, Instant, features

_BATCHES = np.array([1, 2, 4, 8, 16, 32, 64, 128])
_LENGTHS = 2.0 ** np.arange(4, 21)
# Bytes a gradient's element can weigh, from none to so much that the last gradient decides.
_WEIGHTS = np.array([0, 1, 2, 4, 6, 8, 16, 1e6])


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
