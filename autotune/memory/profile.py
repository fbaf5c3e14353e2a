"""`ActivationProfile`: what one micro-batch keeps and needs on a rank, as polynomials.

A profile holds everything that the model's own code allocates in forward, loss and backward:
activations, their gradients, casts of weights that autocast makes, a tied weight's first gradient
while it waits for the second. It holds nothing of the engine: no parameters, no gathered copies, no
finished gradients. An engine's composition (`autotune.memory.engines`) adds those.

A step is cut into phases. Between two phases nothing is at work, so bytes at a phase's start are
the sum of the `end` of the phases before it; inside, the highest instants are kept, as many as can
be the highest for some batch, length or engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FEATURES = ("1", "b", "s", "b*s", "S*S", "b*S*S")
"""Monomials of a `Polynomial`: `b` sequences of the micro-batch, `S` tokens of a sequence, `s` of
them on this rank (``S / cp``)."""

Polynomial = tuple[float, ...]
"""Bytes: one coefficient for each of `FEATURES`."""

ZERO: Polynomial = (0.0,) * len(FEATURES)

Array = NDArray[np.float64]


def features(micro_batch_size: Any, seq_len: Any, cp: Any) -> Array:
    """Return the monomials, ``[..., len(FEATURES)]``, of numbers or arrays of one shape."""
    b, full, ways = np.broadcast_arrays(
        np.asarray(micro_batch_size, float), np.asarray(seq_len, float), np.asarray(cp, float)
    )
    local = full / ways
    return np.stack([np.ones_like(b), b, local, b * local, full**2, b * full**2], axis=-1)


@dataclass(frozen=True, slots=True)
class Instant:
    """A moment inside a phase that can be its highest."""

    bytes: Polynomial
    """Live bytes, less those at the phase's start."""
    gradient_elements: int = 0
    """Elements of parameter gradients the phase has finished by then; their bytes are the
    engine's and not in `bytes`."""
    operator: str = ""
    """What allocated last, for explanations."""


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of a step."""

    end: Polynomial
    """Live bytes at its end less those at its start: left by forward, or freed (below 0)."""
    peaks: tuple[Instant, ...]
    gradient_elements: int = 0
    """Elements of parameter gradients finished at its end."""


@dataclass(frozen=True, slots=True)
class LayerKind:
    """Decoder layers that allocate alike."""

    forward: Phase
    backward: Phase
    """Recomputation, where there is any, is part of it."""
    parameter_elements: int
    trainable_elements: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationProfile:
    """One micro-step of a model under one `TraceKey`, in the order of its phases."""

    source: str
    """``traced`` from the model's code, or ``closed form``."""
    embedding_forward: Phase
    """From the inputs to the first layer: embedding, rotary tables, masks."""
    kinds: tuple[LayerKind, ...]
    layers: tuple[int, ...]
    """Index into `kinds` of each decoder layer, first to last."""
    head_forward: Phase
    """Final norm and output head, up to the logits."""
    loss_forward: Phase
    loss_backward: Phase
    """Up to the gradient of the logits."""
    head_backward: Phase
    embedding_backward: Phase
    """After the first layer's backward."""
    evaluation: Phase
    """Forward and loss of all layers without autograd, relative to an empty rank."""
    versions: tuple[tuple[str, str], ...] = ()
    """Libraries it was traced with."""
