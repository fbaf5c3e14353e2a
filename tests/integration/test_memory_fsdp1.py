"""What FSDP1 holds of frozen layers that are computed again, on a real rank."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytestmark = pytest.mark.integration

WORKER = Path(__file__).with_name("fsdp1_worker.py")
LAYERS = 8


def test_reentrant_frozen_units_hold_their_inputs_and_gradients_to_the_end_of_backward():
    done = subprocess.run(
        [sys.executable, str(WORKER)], capture_output=True, text=True, timeout=300, check=True
    )
    plain, plain_reentrant, fsdp, fsdp_reentrant = map(float, done.stdout.split())
    # Non-reentrant checkpoints hold the same with and without FSDP1.
    assert fsdp == pytest.approx(plain, abs=0.5)
    # Reentrant ones: each layer but the last to run keeps one more (`foreign.holding_inputs`).
    assert fsdp_reentrant - plain_reentrant == pytest.approx(LAYERS - 1, abs=0.5)
