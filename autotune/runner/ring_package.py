"""Imports the core of ring-flash-attn, with flash-attn's kernels or torch's own.

Two things of ring-flash-attn 0.1.8 stand in the way of a plain import. Its Hugging Face adapter
imports a name that transformers 5 no longer has; the adapter is not used here (attention is
registered with transformers in `autotune.runner.ulysses`), so an empty one stands in for it
during the import. And it imports flash-attn, which needs a CUDA compiler to install; where it is
not installed, or the device is a CPU, `flash_kernels` stands in.

Both are taken out of `sys.modules` again: transformers looks for flash-attn there.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from autotune.errors import AutotuneError
from autotune.runner import flash_kernels

FLASH_ATTN = "flash-attn"
TORCH_FLASH = "torch's flash kernels"
_PACKAGE = "ring_flash_attn"
_ADAPTER_NAMES = ("substitute_hf_flash_attn", "update_ring_flash_attn_params")
_KERNEL_NAMES = (
    "_flash_attn_forward", "_flash_attn_backward",
    "_flash_attn_varlen_forward", "_flash_attn_varlen_backward",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class RingPackage:
    """The parts of ring-flash-attn used here."""

    ring: Any
    """`ring_flash_attn.ring_flash_attn`: blocks travel around the ring."""
    llama3: Any
    """`ring_flash_attn.llama3_flash_attn_varlen`: keys and values gathered a few heads at a time,
    for documents of other lengths."""
    utils: Any
    kernels: str
    """Whose kernels it calls: `FLASH_ATTN` or `TORCH_FLASH`."""


_loaded: dict[str, RingPackage] = {}


def load_ring_package(device: str) -> RingPackage:
    """Import ring-flash-attn once a process.

    Args:
        device: ``cuda`` or ``cpu``; a process has one.

    Raises:
        AutotuneError: ring-flash-attn is not installed.
    """
    if device not in _loaded:
        if importlib.util.find_spec(_PACKAGE) is None:
            raise AutotuneError(
                "Ring attention needs the package ring-flash-attn, which is not installed: "
                "pip install 'autotune-llm[train]'."
            )
        theirs = device == "cuda" and importlib.util.find_spec("flash_attn") is not None
        with _stand_ins({} if theirs else _kernel_modules()):
            _loaded[device] = RingPackage(
                ring=importlib.import_module(f"{_PACKAGE}.ring_flash_attn"),
                llama3=importlib.import_module(f"{_PACKAGE}.llama3_flash_attn_varlen"),
                utils=importlib.import_module(f"{_PACKAGE}.utils"),
                kernels=FLASH_ATTN if theirs else TORCH_FLASH,
            )
    return _loaded[device]


def _kernel_modules() -> dict[str, ModuleType]:
    package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    for name in _KERNEL_NAMES:
        setattr(interface, name, getattr(flash_kernels, name))
    return {"flash_attn": package, "flash_attn.flash_attn_interface": interface}


@contextmanager
def _stand_ins(modules: dict[str, ModuleType]) -> Iterator[None]:
    """Let the import find `modules` and an empty Hugging Face adapter."""
    adapter = ModuleType(f"{_PACKAGE}.adapters")
    for name in _ADAPTER_NAMES:
        setattr(adapter, name, None)
    modules = modules | {adapter.__name__: adapter}
    hidden = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, before in hidden.items():
            if before is None:
                del sys.modules[name]
            else:
                sys.modules[name] = before
