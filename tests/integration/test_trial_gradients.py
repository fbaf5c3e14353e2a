"""A trial trains as the run it stands for: its gradients do not depend on how a step is split.

One rank, so that each engine costs a second: the imports are shared by all.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from autotune.spec.workload import Workload
from autotune.trial.launch import rank_environment
from autotune.trial.native_ops import build_native_ops
from autotune.trial.protocol import REQUEST_FILE, Measurement, write_message
from tests.integration.ranks import make_plan, trial_request
from tests.integration.trial_worker import SEEN_FILE

pytestmark = pytest.mark.integration

STRATEGIES = ["ddp", "fsdp2", "zero1", "zero2_offload_optimizer"]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the worker saw, by strategy."""
    base = tmp_path_factory.mktemp("trials")
    # Two sequences in all and an even number of steps: every step of 4 reads each of them twice.
    workload = Workload(
        seq_len=64, global_batch_size=1, precision="fp32", mean_document_tokens=10**8
    )
    requests = []
    for strategy in STRATEGIES:
        folder = base / strategy
        request = trial_request(
            make_plan(strategy, 1),
            folder,
            rungs=[(4, 1), (1, 4), (2, 2)],
            workload=workload,
            measurement=Measurement(warmup_steps=1, min_steps=3, max_steps=3),
        )
        build_native_ops(request, folder)
        folder.mkdir(exist_ok=True)
        write_message(request, folder / REQUEST_FILE)
        requests.append(folder / REQUEST_FILE)
    variables = rank_environment(request, base, "trial-worker", 1) | {
        "RANK": "0",
        "LOCAL_RANK": "0",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.trial_worker", *map(str, requests)],
        env=variables, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    written = {name: base / name / SEEN_FILE for name in STRATEGIES}
    missing = [name for name, path in written.items() if not path.exists()]
    assert not missing, f"{missing}\n{done.stderr[-4000:]}"
    return {name: json.loads(path.read_text()) for name, path in written.items()}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_gradient_of_a_trial_does_not_depend_on_the_accumulation(
    strategy: str, seen: dict[str, dict[str, Any]]
) -> None:
    norms = seen[strategy]["gradient_norms"]
    want = norms["4x1"][-1]
    assert want > 0.1, "gradients too small to compare"
    for split in ("4x1", "2x2", "1x4"):
        assert norms[split] == pytest.approx([want] * 4, rel=1e-4), split
