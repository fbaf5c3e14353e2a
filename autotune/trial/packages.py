"""Packages beyond the `[train]` extra that a workload needs, looked for before ranks start."""

from __future__ import annotations

from importlib.util import find_spec

from autotune.errors import AutotuneError
from autotune.spec.workload import Workload
from autotune.training_rules import EIGHT_BIT

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
