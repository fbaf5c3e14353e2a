"""The activation profile of a tensor-parallel rank, from that of a thinner model.

The layers of a rank are those of a model with its heads and FFN features alone
(`autotune.spec.model.part`), and are traced so. Head and embedding are traced over the whole
vocabulary, because loss and logits span it on every rank (`autotune.runner.tensor_parallel` gathers
the logits); their matrices, gradients and first products are then cut to the rank's rows here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from autotune.memory.profile import (
    FEATURES,
    ZERO,
    ActivationProfile,
    Instant,
    Phase,
    Polynomial,
)
from autotune.memory.profiles import activation_profiles
from autotune.memory.setup import Regime, TraceKey
from autotune.spec.model import ModelSpec
from autotune.spec.model.part import tensor_part

_TOKENS = FEATURES.index("b*s")


def rank_profiles(
    model: ModelSpec, keys: Iterable[TraceKey], tp: int
) -> dict[TraceKey, ActivationProfile]:
    """Return the profile of each key on one of `tp` ranks.

    Raises:
        AutotuneError: see `activation_profiles`.
    """
    thin = tensor_part(model, tp, whole_vocabulary=True)
    found = activation_profiles(thin, keys)
    return found if tp == 1 else {key: _rank(p, model, key, tp) for key, p in found.items()}


def _rank(
    profile: ActivationProfile, model: ModelSpec, key: TraceKey, tp: int
) -> ActivationProfile:
    elements = model.num_embedding_parameters
    width = 4 if key.regime is Regime.FP32 else 2
    logits = width * model.vocab_size
    # What leaves the model is in fp32 under FSDP2.
    left = 4 * model.vocab_size if key.regime is Regime.FSDP else logits
    return replace(
        profile,
        embedding_forward=_rows(profile.embedding_forward, elements, tp),
        head_forward=_gathering(_rows(profile.head_forward, elements, tp), logits, left, tp),
        head_backward=_splitting(_rows(profile.head_backward, elements, tp), logits, tp),
        embedding_backward=_rows(profile.embedding_backward, elements, tp),
    )


def _gathering(phase: Phase, logits: float, left: float, tp: int) -> Phase:
    """Add the instant that holds a rank's logits, all ranks', and those in their order.

    Args:
        phase: From the final norm to the logits.
        logits: Bytes a token, as the head makes them.
        left: Bytes a token, as they leave the phase.
        tp: Ranks.
    """
    instant = Instant(_more(phase.end, logits * (2 + 1 / tp) - left), 0, "all_gather")
    return replace(phase, peaks=(*phase.peaks, instant))


def _splitting(phase: Phase, logits: float, tp: int) -> Phase:
    """Let the gradient of all logits, which a phase starts with, go for the rank's part of it."""
    own = logits / tp
    peaks = tuple(replace(peak, bytes=_more(peak.bytes, own - logits)) for peak in phase.peaks)
    return replace(phase, peaks=(*peaks, Instant(_more(ZERO, own), 0, "split")))


def _rows(phase: Phase, elements: int, tp: int) -> Phase:
    """Return a phase with a rank's rows of matrices over the vocabulary, of so many elements.

    What no size changes there are such matrices: a gradient, or a cast.
    """
    return Phase(
        end=_constant(phase.end, tp),
        peaks=tuple(
            Instant(_constant(p.bytes, tp), _part(p.gradient_elements, elements, tp), p.operator)
            for p in phase.peaks
        ),
        gradient_elements=_part(phase.gradient_elements, elements, tp),
    )


def _constant(polynomial: Polynomial, tp: int) -> Polynomial:
    return (polynomial[0] / tp, *polynomial[1:])


def _part(finished: int, elements: int, tp: int) -> int:
    matrices, rest = divmod(finished, elements)
    return matrices * elements // tp + rest


def _more(polynomial: Polynomial, bytes_a_token: float) -> Polynomial:
    values = list(polynomial)
    values[_TOKENS] += bytes_a_token
    return tuple(values)
