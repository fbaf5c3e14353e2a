"""Trials on one CUDA GPU: every engine at world size 1, the allocator's limit, recompute, LoRA."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from autotune.plan import Plan
from autotune.spec.workload import Lora, Precision, Workload
from autotune.trial.launch import Ended
from autotune.trial.outcome import read_rungs
from autotune.trial.protocol import Measurement, ModelSource, Outcome
from autotune.trial.record import TrialRecord
from autotune.units import MIB
from tests.integration.ranks import make_plan, run, small_config, trial_request

pytestmark = pytest.mark.gpu

CONFIG = small_config(
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=8,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=64,
    vocab_size=8192,
    max_position_embeddings=2048,
)
SEQ_LEN = 1024
ENGINES = {
    "ddp": "ddp",
    "zero1": "deepspeed",
    "zero2": "deepspeed",
    "zero3": "deepspeed",
    "fsdp2": "fsdp2",
}


def trial(
    plan: Plan, folder: Path, *, rungs: list[tuple[int, int]], **changes: Any
) -> tuple[Ended, list[TrialRecord]]:
    if plan.zero_stage and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    workload = changes.pop("workload", Workload(seq_len=SEQ_LEN, global_batch_size=8))
    request = trial_request(
        plan,
        folder,
        rungs=rungs,
        model=ModelSource(name="small", config=CONFIG),
        device="cuda",
        workload=workload,
        measurement=Measurement(min_steps=3, max_steps=5, target_seconds=1.0),
        **changes,
    )
    ended = run(request)
    return ended, read_rungs(request, ended.results, ended.outcome, ended.message)


def ran(
    plan: Plan, folder: Path, *, rungs: list[tuple[int, int]], **changes: Any
) -> tuple[Ended, list[TrialRecord]]:
    """A trial that must end well, or the rank's last words."""
    ended, records = trial(plan, folder, rungs=rungs, **changes)
    assert ended.outcome is Outcome.OK, f"{ended.message}\n{last_words(folder)}"
    assert [record.outcome for record in records] == [Outcome.OK] * len(rungs)
    return ended, records


def last_words(folder: Path) -> str:
    return (folder / "rank-0.log").read_text(errors="replace")[-3000:]


@pytest.mark.parametrize("strategy", ENGINES)
def test_engine_runs_as_asked(strategy: str, tmp_path: Path) -> None:
    ended, (small, large) = ran(make_plan(strategy, 1), tmp_path / strategy, rungs=[(1, 8), (4, 2)])
    found = ended.results[0].asserted
    assert found["engine"] == ENGINES[strategy]
    assert found.get("zero_stage", 0) == make_plan(strategy, 1).zero_stage
    assert found["attention"] == "sdpa, block-diagonal mask"
    assert found["attention_shape"] == [1, 16, SEQ_LEN, 64]
    for record in (small, large):
        assert record.tokens_per_s and record.step_s and record.optimizer_step_s
        assert record.peak_reserved_bytes and record.peak_allocated_bytes
        assert record.peak_reserved_bytes >= record.peak_allocated_bytes
    # The same 8 sequences a step: 8 micro-steps of 1, composed, or 2 of 4, measured as they are.
    assert small.measured_accum_steps == (1, 2)
    assert large.measured_accum_steps == (2,)
    assert large.peak_allocated_bytes > small.peak_allocated_bytes


def test_fp32_and_unpacked_runs(tmp_path: Path) -> None:
    workload = Workload(
        seq_len=SEQ_LEN, global_batch_size=8, precision=Precision.FP32, packing=False
    )
    ended, _ = ran(make_plan("fsdp2", 1), tmp_path / "fp32", rungs=[(2, 4)], workload=workload)
    assert ended.results[0].asserted["attention"] == "sdpa, causal"


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "fsdp2"])
def test_recompute_lowers_the_peak(strategy: str, tmp_path: Path) -> None:
    peaks = []
    for recompute in (False, True):
        plan = make_plan(strategy, 1, recompute=recompute)
        _, (record,) = ran(plan, tmp_path / f"recompute-{recompute}", rungs=[(8, 1)])
        peaks.append(record.peak_allocated_bytes)
    assert peaks[1] < 0.8 * peaks[0]


def test_allocator_ends_the_ladder_at_the_limit(tmp_path: Path) -> None:
    plan, rungs = make_plan("fsdp2", 1), [(1, 8), (2, 4), (8, 1)]
    _, (smallest, _, largest) = ran(plan, tmp_path / "free", rungs=rungs)
    limit = (smallest.peak_reserved_bytes + largest.peak_allocated_bytes) // 2
    assert limit - smallest.peak_reserved_bytes > 256 * MIB, "the rungs lie too close to part them"

    ended, records = trial(plan, tmp_path / "limited", rungs=rungs, memory_limit_bytes=limit)
    assert ended.outcome is Outcome.OOM, last_words(tmp_path / "limited")
    assert records[0].outcome is Outcome.OK
    assert records[-1].outcome is Outcome.OOM
    assert records[-1].plan["micro_batch_size"] == 8
    assert "no memory for" in records[-1].message
    assert max(r.peak_reserved_bytes for r in records[:-1] if r.peak_reserved_bytes) <= limit


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "fsdp2"])
def test_lora(strategy: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    plan = make_plan(strategy, 1)
    _, (full,) = ran(plan, tmp_path / "full", rungs=[(2, 4)])
    workload = Workload(seq_len=SEQ_LEN, global_batch_size=8, adapter=Lora(r=8))
    _, (lora,) = ran(plan, tmp_path / "lora", rungs=[(2, 4)], workload=workload)
    assert lora.peak_allocated_bytes < full.peak_allocated_bytes


@pytest.mark.parametrize("strategy", ["zero2_offload_optimizer", "fsdp2_offload"])
def test_offload_moves_states_to_the_host(strategy: str, tmp_path: Path) -> None:
    _, (on_device,) = ran(
        make_plan(strategy.split("_")[0], 1), tmp_path / "on-device", rungs=[(1, 8)]
    )
    _, (offloaded,) = ran(make_plan(strategy, 1), tmp_path / "offloaded", rungs=[(1, 8)])
    assert offloaded.peak_allocated_bytes < on_device.peak_allocated_bytes
