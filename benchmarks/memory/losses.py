"""Losses of the code that ran then, in bytes a logit: the vocabulary times the tokens.

A traced profile has this project's loss. These are the logit-shaped tensors of other code, read in
the version that ran; a phase begins with the head's bf16 logits alive, and they are counted to the
end of the loss's forward (docs/memory.md says where the runs disagree).

- `transformers` 4.x, ``modeling_llama.py`` and its kin: `logits.float()`, the shifted logits copied
  by `.contiguous()`, log-softmax; backward holds log-softmax, its gradient and theirs.
- the same, while a script's variable holds the output, whose logits are fp32 (fsdp_qlora
  ``train.py``: ``output = None`` comes after the step).
- ``modeling_gpt_bigcode.py`` of 4.x has no `.float()`: bf16, and fp32 under autocast, which casts
  the shifted copy for the loss.
- `fast_ce`: ``fms_acceleration_foak/kernels/unsloth/cross_entropy_loss.py``: `.float()` and the
  shifted copy, over which backward writes its gradient.
- `litgpt`: LoRA's script makes the logits and the loss in slices of 128 tokens, all in bf16; the
  full script slices whole logits.
"""

from __future__ import annotations

from dataclasses import replace

from autotune.memory.profile import ActivationProfile, Instant, Phase, Polynomial

_LOGITS = 2


def _logits(bytes_each: float, vocab: int) -> Polynomial:
    return (0.0, 0.0, 0.0, bytes_each * vocab, 0.0, 0.0)


def _phase(peak: float, end: float, vocab: int, operator: str) -> Phase:
    return Phase(
        end=_logits(end, vocab), peaks=(Instant(bytes=_logits(peak, vocab), operator=operator),)
    )


# Above the bf16 logits: highest in forward; in all, kept after it; highest in backward above that;
# and what the caller's variable holds until the step ends.
_UNFUSED = {
    "transformers": (12, 4, 8, 0),
    "transformers held": (12, 8, 8, 4),
    "fast_ce": (8, 4, 4, 0),
    "bigcode": (4, 2, 4, 0),
    "bigcode autocast": (10, 4, 8, 0),
    "litgpt": (2, 4, 0, 0),
    "torchtune": (8, 4, 8, 0),
}


def with_loss(profile: ActivationProfile, name: str, vocab: int) -> ActivationProfile:
    """Return a profile with another loss; one that is not in the list is traced, so left alone.

    Args:
        profile: with logits at the end of `head_forward` and their gradient at the start of
            `head_backward`, both bf16.
        name: of the loss in the module's list.
        vocab: size of the vocabulary.
    """
    if name not in _UNFUSED:
        return profile
    forward, kept, backward, held = _UNFUSED[name]
    last = profile.embedding_backward
    freed = tuple(a - b for a, b in zip(last.end, _logits(held, vocab), strict=True))
    return replace(
        profile,
        loss_forward=_phase(forward, kept - _LOGITS, vocab, name),
        loss_backward=_phase(backward, _LOGITS + held - kept, vocab, name),
        embedding_backward=replace(last, end=freed),
    )
