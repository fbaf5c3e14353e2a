"""A rung measured inside a ladder is the rung measured alone.

Token counts are equal. Memory: the ladder's peak may hold what smaller rungs left in the
allocators, so it is compared with a tolerance. Times are recorded by both and never asserted.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from autotune.spec.workload import Workload
from autotune.trial.protocol import AccumulationResult, Measurement
from tests.integration.ranks import make_plan, run_well, trial_request

pytestmark = pytest.mark.integration

MEASUREMENT = Measurement(min_steps=3, max_steps=3, target_seconds=0.1)


def measured(
    strategy: str, folder: Path, sizes: list[int], monitored: int
) -> list[AccumulationResult]:
    # Documents that never end before the sequence does: every sequence has 63 labels.
    workload = Workload(seq_len=64, global_batch_size=32, mean_document_tokens=10**8)
    request = trial_request(
        make_plan(strategy, 2, micro_batch_size=sizes[0]),
        folder,
        rungs=[(size, 16 // size) for size in sizes],
        measurement=MEASUREMENT,
        workload=workload,
    )
    results = run_well(request).results
    rungs = [rung for rung in results[0].rungs if rung.micro_batch_size == monitored]
    assert len(results[0].rungs) == len(sizes) and len(rungs) == 1
    return rungs[0].accumulations


@pytest.mark.parametrize("strategy", ["fsdp2", pytest.param("zero2", marks=pytest.mark.slow)])
def test_a_rung_of_a_ladder_agrees_with_a_launch_of_its_own(strategy: str, tmp_path: Path) -> None:
    in_ladder = measured(strategy, tmp_path / "ladder", [2, 8], 8)
    alone = measured(strategy, tmp_path / "alone", [8], 8)
    # The plan's own accumulation is 2: nothing else is measured.
    assert [part.grad_accum_steps for part in in_ladder] == [2]
    assert [part.grad_accum_steps for part in alone] == [2]
    for one, other in zip(in_ladder, alone, strict=True):
        assert one.valid_tokens == other.valid_tokens == [8 * 2 * one.grad_accum_steps * 63] * 3
        assert one.mean_step_tokens == other.mean_step_tokens == one.valid_tokens[0]
        assert len(one.step_s) == len(other.step_s) == 3
        assert len(one.micro_step_s) == len(other.micro_step_s) == 3 * (one.grad_accum_steps - 1)
        for part in (one, other):
            assert all(0 < part.sync_micro_step_s[i] < part.step_s[i] for i in range(3))
            assert all(0 < part.optimizer_step_s[i] < part.step_s[i] for i in range(3))
        assert one.peak_allocated_bytes == pytest.approx(other.peak_allocated_bytes, rel=0.25)
        ratio = sum(one.step_s) / sum(other.step_s)
        print(f"{strategy} accumulation {one.grad_accum_steps}: ladder / alone {ratio:.2f}, "
              f"peak {one.peak_allocated_bytes} / {other.peak_allocated_bytes}, "
              f"tokens {one.valid_tokens} / {other.valid_tokens}")  # fmt: skip
