"""What the fork server takes for a CUDA context is there with one, and not without."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("action", "touched"),
    [
        ("from autotune.runner.imports import import_everything; import_everything()", False),
        ("import torch; assert torch.cuda.is_available() and torch.cuda.device_count()", False),
        ("import torch; torch.zeros(1, device='cuda')", True),
    ],
)
def test_a_context_is_seen_in_the_mappings(action: str, touched: bool) -> None:
    script = f"{action}\nfrom autotune.runner.mappings import touched_cuda\nprint(touched_cuda())\n"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"},
    )
    assert done.stdout.splitlines()[-1:] == [str(touched)], done.stderr[-2000:]
