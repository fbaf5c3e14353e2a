"""A frozen base in 4 or 8 bits: what it stores, and what its matrix products need.

Only the decoder layers' projections are quantised; embeddings, the output head, norms and biases
stay as they are (transformers `integrations/bitsandbytes.py`, ``get_keys_to_not_convert``).

Sources: Dettmers et al., "QLoRA", arXiv:2305.14314; bitsandbytes 0.50 ``functional.py``
(`quantize_4bit`, block 64, and `quantize_blockwise` of its scales, block 256),
``nn/modules.py`` (`Int8Params`), ``autograd/_functions.py`` (`MatMul4Bit`); AutoGPTQ
``nn_modules/qlinear`` (``qweight``, ``qzeros``, ``scales``, ``g_idx``; groups of 128).
"""

from __future__ import annotations

from typing import Any

from autotune.memory.setup import Quantised

_FP32, _FP16 = 4, 2
_NF4_BLOCK, _SCALE_BLOCK, _GPTQ_GROUP = 64, 256, 128


def bytes_per_element(kind: Quantised, shape: tuple[int, int]) -> float:
    """Return the stored bytes of one weight of a quantised projection, scales included.

    Args:
        kind: how it is stored.
        shape: (inputs, outputs) of the projection.
    """
    inputs, outputs = shape
    match kind:
        case Quantised.NF4:
            return 0.5 + _FP32 / _NF4_BLOCK
        case Quantised.NF4_DOUBLE:
            return 0.5 + 1 / _NF4_BLOCK + _FP32 / (_NF4_BLOCK * _SCALE_BLOCK)
        case Quantised.INT8:
            return 1 + _FP32 / inputs  # one scale an output
        case Quantised.GPTQ:
            # a scale and a 4-bit zero point a group and output, a group's index an input
            return 0.5 + (_FP16 + 0.5) / _GPTQ_GROUP + _FP32 / outputs


def stored_bytes(kind: Quantised, shapes: dict[str, tuple[int, int]]) -> float:
    """Return the stored bytes of a set of projections, by name and (inputs, outputs)."""
    return sum(inputs * outputs * bytes_per_element(kind, (inputs, outputs))
               for inputs, outputs in shapes.values())  # fmt: skip


def working_bytes(kind: Quantised, largest: Any, compute_bytes: int) -> Any:
    """Return the copy a matrix product makes of one weight of `largest` elements.

    Backward multiplies by the whole matrix in the compute type; forward has it too where no
    4-bit kernel takes the batch (bitsandbytes before 0.50, AutoGPTQ's backward).
    """
    return largest * (1 if kind is Quantised.INT8 else compute_bytes)
