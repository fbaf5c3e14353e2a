"""Losses of the code that ran then, in bytes a logit: the vocabulary times the tokens.

A traced profile has this project's loss. These are the logit-shaped tensors of other code, read in
the version that ran; a phase begins with the head's bf16 logits alive.

- `transformers` 4.x, ``modeling_llama.py`` and its kin: `logits.float()`, the shifted logits copied
  by `.contiguous()`, log-softmax; backward holds log-softmax, its gradient and theirs.
- ``modeling_gpt_bigcode.py`` of 4.x has no `.float()`: bf16, and fp32 under autocast, which casts
  the shifted copy for the loss.
- `fast_ce`: ``fms_acceleration_foak/kernels/unsloth/cross_entropy_loss.py``: `.float()` and the
  shifted copy, over which backward writes its gradient.
- `fused_linear`: Liger ``ops/fused_linear_cross_entropy.py``: head and loss over slices of as many
  tokens as make a slice's logits no larger than the hidden states; what is kept is the gradient of
  the hidden states, and of the head's weight where it trains.
- `litgpt`: LoRA's script makes the logits and the loss in slices of 128 tokens, all in bf16; the
  full script slices whole logits.
"""

from __future__ import annotations

from dataclasses import replace

from autotune.memory.profile import ZERO, ActivationProfile, Instant, Phase, Polynomial

_LOGITS = 2


def _logits(bytes_each: float, vocab: int) -> Polynomial:
    return (0.0, 0.0, 0.0, bytes_each * vocab, 0.0, 0.0)


def _phase(peak: float, end: float, vocab: int, operator: str) -> Phase:
    return Phase(
        end=_logits(end, vocab), peaks=(Instant(bytes=_logits(peak, vocab), operator=operator),)
    )


# Above the bf16 logits: highest in forward, kept after it (the logits freed), highest in backward
# above what is kept.
_UNFUSED = {
    "transformers": (12, 4, 8),
    "fast_ce": (8, 4, 4),
    "bigcode": (4, 2, 4),
    "bigcode autocast": (10, 4, 8),
    "litgpt": (2, 4, 0),
    "torchtune": (8, 4, 8),
}


def with_loss(
    profile: ActivationProfile, name: str, vocab: int, hidden: int, head_trains: bool
) -> ActivationProfile:
    """Return a profile with another loss.

    Args:
        profile: with logits at the end of `head_forward` and their gradient at the start of
            `head_backward`, both bf16.
        name: of the loss in the module's list.
        vocab: size of the vocabulary.
        hidden: hidden size.
        head_trains: whether the head's weight has a gradient.
    """
    if name == "fused_linear":
        return _fused_linear(profile, vocab, hidden, head_trains)
    forward, kept, backward = _UNFUSED[name]
    return replace(
        profile,
        loss_forward=_phase(forward, kept - _LOGITS, vocab, name),
        loss_backward=_phase(backward, _LOGITS - kept, vocab, name),
    )


def _fused_linear(
    profile: ActivationProfile, vocab: int, hidden: int, head_trains: bool
) -> ActivationProfile:
    norm = _less_logits(profile.head_forward, vocab)
    weight = 2.0 * vocab * hidden * head_trains
    # The gradient of the hidden states, and one slice's logits.
    kept: Polynomial = (weight, 0.0, 0.0, 2.0 * hidden, 0.0, 0.0)
    peak: Polynomial = (weight, 0.0, 0.0, 4.0 * hidden, 0.0, 0.0)
    return replace(
        profile,
        head_forward=norm,
        loss_forward=Phase(end=kept, peaks=(Instant(bytes=peak, operator="fused_linear"),)),
        loss_backward=Phase(end=ZERO, peaks=()),
        head_backward=Phase(
            end=tuple(-a - b for a, b in zip(norm.end, kept, strict=True)),
            peaks=(Instant(bytes=(0.0, 0.0, 0.0, 6.0 * hidden, 0.0, 0.0), operator="norm"),),
            gradient_elements=profile.head_backward.gradient_elements,
        ),
    )


def _less_logits(phase: Phase, vocab: int) -> Phase:
    def less(value: Polynomial) -> Polynomial:
        return tuple(a - b for a, b in zip(value, _logits(_LOGITS, vocab), strict=True))

    end = less(phase.end)
    peaks = tuple(replace(i, bytes=less(i.bytes)) for i in phase.peaks)
    return Phase(end=end, peaks=peaks, gradient_elements=phase.gradient_elements)
