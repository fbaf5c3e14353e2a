"""Liger's kernels, put in by liger-kernel's own function for the family, and the proof of it."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from autotune.errors import AutotuneError
from autotune.spec.workload import LigerKernel

_OPTIONS: Mapping[LigerKernel, tuple[str, ...]] = {
    LigerKernel.ROPE: ("rope",),
    LigerKernel.RMS_NORM: ("rms_norm",),
    LigerKernel.GLU_ACTIVATION: ("swiglu", "geglu"),
    LigerKernel.FUSED_LINEAR_CROSS_ENTROPY: ("fused_linear_cross_entropy",),
}
"""Parameters of `apply_liger_kernel_to_*` by kernel; a family's function has one of several."""
_PACKAGE = "liger_kernel"


def apply_liger(model: Any, kernels: Collection[LigerKernel]) -> None:
    """Put the kernels asked for, and no others, into a model, before an engine wraps it.

    Raises:
        AutotuneError: liger-kernel is not installed, has no kernels for the family, or did not put
            one of them in.
    """
    if not kernels:
        return
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        raise AutotuneError(
            f"Liger's kernels need liger-kernel and Triton ({error}). Install them (pip install "
            "liger-kernel), or leave the liger_ keys out."
        ) from None
    base = _transformers_model(model)
    kind = base.config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise AutotuneError(f"liger-kernel has no kernels for {kind}. Leave the liger_ keys out.")
    apply = MODEL_TYPE_TO_APPLY_LIGER_FN[kind]
    apply(model=base, **_options(apply.__code__.co_varnames, kernels))
    missing = missing_kernels(base, kernels)
    if missing:
        raise AutotuneError(
            f"Liger's {', '.join(missing)} are not in the model although liger-kernel was told to "
            "put them in. Leave those keys out."
        )


def _options(known: Collection[str], kernels: Collection[LigerKernel]) -> dict[str, bool]:
    """Return every switch the family's function has, on or off: its own defaults differ."""
    options = {
        name: kernel in kernels
        for kernel, names in _OPTIONS.items()
        for name in names
        if name in known
    }
    return options | {"cross_entropy": False} if "cross_entropy" in known else options


def missing_kernels(model: Any, kernels: Collection[LigerKernel]) -> list[LigerKernel]:
    """Return those of the kernels that are not in the model, wrapped or not.

    Looks at what would run: the class or the function each norm, FFN and the model itself take
    their `forward` from, and the rotary function of the attention layers' own module.
    """
    base = _transformers_model(model)
    norms = [m for m in base.modules() if type(m).__name__.endswith("RMSNorm")]
    ffns = [m for m in base.modules() if hasattr(m, "down_proj") and hasattr(m, "gate_proj")]
    found = {
        LigerKernel.ROPE: _is_ligers(_rotary(base)),
        LigerKernel.RMS_NORM: bool(norms) and all(_is_ligers(m.forward) for m in norms),
        LigerKernel.GLU_ACTIVATION: bool(ffns) and all(_is_ligers(m.forward) for m in ffns),
        LigerKernel.FUSED_LINEAR_CROSS_ENTROPY: _is_ligers(base.forward),
    }
    return [kernel for kernel in kernels if not found[kernel]]


def _rotary(base: nn.Module) -> object:
    """Return the rotary function that the model's layers call, by the name in their module."""
    names = getattr(base, "_no_split_modules", None) or ()
    for module in base.modules():
        if type(module).__name__.removeprefix("FSDP") in names:
            home = type(module).__mro__[1 if type(module).__name__.startswith("FSDP") else 0]
            return getattr(sys.modules[home.__module__], "apply_rotary_pos_emb", None)
    return None


def _is_ligers(function: object) -> bool:
    function = getattr(function, "__func__", function)
    return str(getattr(function, "__module__", "")).startswith(_PACKAGE)


def _transformers_model(model: Any) -> Any:
    """Return the model of transformers inside an adapter's wrapper."""
    get = getattr(model, "get_base_model", None)
    return get() if get is not None and not isinstance(model, PreTrainedModel) else model
