"""Bytes an optimizer keeps between steps and needs inside one.

Sources, read in the packages: torch 2.13 ``torch/optim/{adam,sgd,_adafactor,_muon}.py``;
bitsandbytes 0.50 ``optim/optimizer.py`` (`Optimizer2State`, `Optimizer1State`). Sizes are numbers
or numpy arrays; a shape is the (rows, columns) of a matrix.
"""

from __future__ import annotations

from typing import Any

from autotune.memory.setup import Optimizer

_BF16, _FP32 = 2, 4

# bitsandbytes keeps one fp32 scale for each 256 elements of an 8-bit state.
_STATE_BLOCK = 256

_BLOCKWISE_BYTES = 1 + _FP32 / _STATE_BLOCK

MANAGED = frozenset({Optimizer.PAGED_ADAMW_8BIT})
"""States in CUDA managed memory: outside PyTorch's allocator, on the device or the host as room
allows. The scales stay in the allocator."""


def state_bytes_per_element(
    optimizer: Optimizer, element_bytes: int = _FP32, shape: tuple[float, float] | None = None
) -> float:
    """Return the bytes kept in PyTorch's allocator for each trainable element.

    Args:
        optimizer: what steps.
        element_bytes: of a state that is not quantised; torch's take the parameter's type.
        shape: of the matrix, for Adafactor, whose state is one row and one column of it.

    Raises:
        ValueError: Adafactor without a shape.
    """
    match optimizer:
        case Optimizer.ADAMW:
            return 2 * element_bytes
        case Optimizer.ADAMW_8BIT:
            return 2 * _BLOCKWISE_BYTES
        case Optimizer.PAGED_ADAMW_8BIT:
            return 2 * _FP32 / _STATE_BLOCK
        case Optimizer.LION:
            return _FP32  # bitsandbytes: fp32 whatever the parameter's type
        case Optimizer.MUON | Optimizer.SGD_MOMENTUM:
            return element_bytes
        case Optimizer.SGD:
            return 0
        case Optimizer.ADAFACTOR:
            if shape is None:
                raise ValueError("Adafactor's state depends on the matrix's shape.")
            rows, columns = shape
            return element_bytes * (rows + columns) / (rows * columns)


def managed_bytes_per_element(optimizer: Optimizer) -> float:
    """Return the bytes in CUDA managed memory for each trainable element (paged optimizers)."""
    return 2.0 if optimizer in MANAGED else 0.0


def step_bytes(
    optimizer: Optimizer,
    elements: Any,
    largest: Any,
    *,
    foreach: bool = False,
    fused: bool = False,
    element_bytes: int = _FP32,
    before: Any = 0,
    largest_shape: tuple[float, float] | None = None,
) -> Any:
    """Return the largest temporaries of one step.

    Args:
        optimizer: what steps.
        elements: trainable elements on the rank.
        largest: elements of the largest parameter (or of its shard).
        foreach: all parameters step at once, so temporaries are of `elements`.
        fused: one kernel updates in place.
        element_bytes: of parameters and states.
        before: elements of the parameter stepped before the largest: torch's loops still hold its
            last temporary when they begin the next.
        largest_shape: of the largest matrix, for Muon's Gram matrices.
    """
    match optimizer:
        case Optimizer.ADAMW if fused:
            return 0
        case Optimizer.ADAMW if foreach:
            return element_bytes * elements  # exp_avg_sq_sqrt
        case Optimizer.ADAMW:
            return element_bytes * (2 * largest + before)  # the root and its quotient
        case Optimizer.ADAFACTOR:
            return element_bytes * (elements if foreach else largest + before)  # var_estimate
        case Optimizer.MUON:
            return _muon_step_bytes(largest, element_bytes, largest_shape)
        case _:
            return 0  # in place: torch's SGD, bitsandbytes' block-wise kernels


def _muon_step_bytes(
    largest: Any, element_bytes: int, largest_shape: tuple[float, float] | None
) -> Any:
    """Newton-Schulz of one matrix: Nesterov's update, iterate and next iterate, two Gram matrices.

    The Gram matrices are bf16, of the smaller side.
    """
    side = min(largest_shape) if largest_shape else largest**0.5
    return (element_bytes + 2 * _BF16) * largest + 2 * _BF16 * side**2
