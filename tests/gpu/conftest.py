from __future__ import annotations

import subprocess

import pytest


def _gpu_present() -> bool:
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and "GPU " in done.stdout


GPU_PRESENT = _gpu_present()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="no CUDA GPU here (nvidia-smi lists none)")
    for item in items:
        if item.get_closest_marker("gpu") and not GPU_PRESENT:
            item.add_marker(skip)
