"""Packages beyond the `[train]` extra that a workload needs, looked for before ranks start."""

from __future__ import annotations

import logging
from importlib.util import find_spec

from autotune.errors import AutotuneError
from autotune.spec.workload import Workload
from autotune.training_rules import EIGHT_BIT

_LOG = logging.getLogger(__name__)
_PIP = {"liger_kernel": "liger-kernel"}


def check_packages(workload: Workload) -> None:
    """Refuse a workload whose ranks would stop at an import.

    Raises:
        AutotuneError: names what is missing, and which key asks for it.
    """
    for package, why in _needed(workload).items():
        if find_spec(package) is None:
            raise AutotuneError(
                f"{why} needs {package}, which is not installed: pip install "
                f"{_PIP.get(package, package)}, or leave it out."
            )


def warn_of_slow_fp8(workload: Workload, device: str, *, compiled: bool) -> None:
    """Say where fp8 is not what makes a run faster; Axolotl 0.19 says the second as well."""
    if workload.fp8 and device == "cpu":
        _LOG.warning(
            "fp8 on CPU ranks is emulated: the roundings are a GPU's, the products are fp32 and "
            "slower than without. Times measured so say nothing about GPUs."
        )
    elif workload.fp8 and not compiled:
        _LOG.warning(
            "fp8 without torch_compile: each operand is cast by way of fp32 copies, which moves "
            "several times the bytes it must. Set torch_compile: true."
        )


def _needed(workload: Workload) -> dict[str, str]:
    """Return, by package, what needs it."""
    needed: dict[str, str] = {}
    if workload.liger:
        needed |= dict.fromkeys(("liger_kernel", "triton"), "Liger")
    if workload.fp8:
        needed["torchao"] = "fp8"
    if workload.adapter is not None and workload.adapter.base_storage is not None:
        needed["bitsandbytes"] = "A base in 4 bits (load_in_4bit, --adapter qlora)"
    if workload.optimizer in EIGHT_BIT:
        needed["bitsandbytes"] = f"The optimizer {workload.optimizer}"
    return needed
