"""On which hardware, with which software and by which estimator something was measured."""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from autotune import __version__
from autotune.spec.hardware import cpu_name, detect_hardware
from autotune.spec.nvml import nvml_devices, nvml_driver

_LIBRARIES = ("torch", "transformers", "accelerate", "deepspeed", "peft")
_NOT_ESTIMATING = {
    "advice.py", "fingerprint.py", "knowledge.py", "residuals.py", "student.py", "verdict.py",
}  # fmt: skip
"""Modules of this folder that judge predictions and make none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fingerprint:
    """Measurements of equal fingerprints may be taken together."""

    gpu: str
    """As `HardwareSpec` names it."""
    gpu_memory_bytes: int
    num_gpus: int
    """Visible ones, used or not; on CPU ranks the cores."""
    driver: str
    """NVIDIA's driver; on CPU ranks the processor."""
    libraries: str
    estimator: str
    """Digest of the code that predicts memory."""

    def to_dict(self) -> dict[str, str | int]:
        """Return the JSON form."""
        return asdict(self)


def machine_fingerprint(device: Literal["cuda", "cpu"]) -> Fingerprint:
    """Return this machine's.

    Raises:
        AutotuneError: asked for CUDA where there is no GPU.
    """
    one = detect_hardware(1, device)
    on_cpu = one.gpu.is_cpu
    return Fingerprint(
        gpu=one.gpu.name,
        gpu_memory_bytes=one.gpu.memory_bytes,
        num_gpus=len(os.sched_getaffinity(0)) if on_cpu else len(nvml_devices()[0]),
        driver=cpu_name() if on_cpu else nvml_driver(),
        libraries=_versions(),
        estimator=estimator_digest(),
    )


def _versions() -> str:
    found = []
    for name in _LIBRARIES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} none")
    return ", ".join(found)


@cache
def estimator_digest() -> str:
    """Return a digest of the modules that predict memory: other formulas have other residuals."""
    folder = Path(__file__).parent
    digest = hashlib.sha256(__version__.encode())
    for file in sorted(folder.rglob("*.py")):
        if file.name not in _NOT_ESTIMATING:
            digest.update(file.relative_to(folder).as_posix().encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
