"""The estimated peak of ring attention against what two real ranks' allocators handed out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from autotune.plan import CpBackend, Engine, Plan
from autotune.spec.workload import Workload
from autotune.trial.launch import rank_environment
from autotune.trial.native_ops import build_native_ops
from autotune.trial.protocol import REQUEST_FILE, write_message

pytest.importorskip("torch")
pytestmark = [pytest.mark.integration, pytest.mark.slow]

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "memory"
TOLERANCE = 0.02
ENGINES: dict[str, dict[str, Any]] = {
    "zero2": {"engine": Engine.DEEPSPEED, "zero_stage": 2},
    "fsdp2": {"engine": Engine.FSDP2},
}


@pytest.mark.parametrize(("strategy", "packing"), [("zero2", False), ("fsdp2", True)])
def test_peak_of_a_ring(strategy, packing, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARK))
    from ranks import request_of
    from ranks_cases import Case
    from ranks_errors import row_of
    from ranks_measured import measured_row, read_rows, write_rows

    plan = Plan(
        strategy=strategy, cp=2, cp_backend=CpBackend.RING, micro_batch_size=2, **ENGINES[strategy]
    )
    workload = Workload(seq_len=512, global_batch_size=2, packing=packing)
    case = Case(architecture="qwen3-v512", plan=plan, workload=workload)
    folder = tmp_path / "run"
    folder.mkdir()
    request = request_of(case, folder)
    build_native_ops(request, folder)
    write_message(request, folder / REQUEST_FILE)
    done = subprocess.run(
        [sys.executable, str(BENCHMARK / "ranks_worker.py"), str(folder)],
        env=rank_environment(request, tmp_path, "ranks", 1) | {"PYTHONSAFEPATH": ""},
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert "\tok\t" in done.stdout, done.stderr[-4000:]
    table = tmp_path / "measured.csv"
    write_rows(table, [measured_row(case.name, folder, plan.world_size)])
    assert abs(row_of(case, read_rows(table)[case.name])["error"]) <= TOLERANCE
