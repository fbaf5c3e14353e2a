"""ZeRO++ hpZ on real ranks: a second copy inside groups of two of four, and the same training."""

from __future__ import annotations

from pathlib import Path

import pytest

from autotune.spec.workload import Precision, Workload
from tests.integration.ranks import logged, make_plan, run_well, training_request

pytestmark = [pytest.mark.integration, pytest.mark.slow]


@pytest.mark.parametrize("recompute", [False, True])
def test_the_second_copy_trains_the_same(
    recompute: bool, tmp_path: Path, corpus: Path, initial_state: Path
) -> None:
    settings = {
        "data": corpus,
        "workload": Workload(
            seq_len=64, global_batch_size=8, precision=Precision.FP32, optimizer="sgd"
        ),
        "weights": initial_state,
        "max_steps": 12,
        "learning_rate": 0.1,
        "max_grad_norm": 0.0,
    }
    plans = {
        "one process": make_plan("ddp", 1, micro_batch_size=8),
        "second copy": make_plan(
            "zero3", 4, micro_batch_size=1, grad_accum_steps=2, hpz=2, recompute=recompute
        ),
    }
    for name, plan in plans.items():
        ended = run_well(training_request(plan, tmp_path / name, **settings))
        assert ended.results[0].asserted.get("zero_stage", 3) == 3
    one, two = (logged(tmp_path / name, "loss") for name in plans)
    assert len(one) == 12 and one[0] - one[-1] > 0.1
    assert two == pytest.approx(one, abs=1e-5)
    norms = [logged(tmp_path / name, "grad_norm") for name in plans]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
