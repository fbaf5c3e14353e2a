"""Build study folders as a search leaves them, for the report's tests."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from autotune.plan import Engine, Plan, Recompute
from autotune.trial.protocol import Outcome
from autotune.trial.record import TrialRecord

MIB = 2**20
OOM_MESSAGE = (
    "rank 1: RuntimeError: [enforce fail at alloc_cpu.cpp:121] err == 0. "
    "DefaultCPUAllocator: can't allocate memory: you tried to allocate 134217728 bytes."
)
CRASH_MESSAGE = (
    'rank 0: ValueError: head_dim, "8", is odd; expected <even>\n'
    "  File \"model.py\", line 7, in forward\n    raise ValueError(f'...')\n"
)
STRATEGIES: dict[str, dict[str, Any]] = {
    "zero1": {"engine": Engine.DEEPSPEED, "zero_stage": 1},
    "zero2": {"engine": Engine.DEEPSPEED, "zero_stage": 2},
    "zero3": {"engine": Engine.DEEPSPEED, "zero_stage": 3},
    "fsdp2": {"engine": Engine.FSDP2},
    "fsdp2_no_reshard": {"engine": Engine.FSDP2, "reshard_after_forward": False},
}


def make_plan(strategy: str = "zero2", micro: int = 4, **changes: Any) -> Plan:
    """A plan of two ranks and 64 sequences a step."""
    plan = Plan(
        strategy=strategy,
        dp_shard=2,
        micro_batch_size=micro,
        grad_accum_steps=32 // micro,
        **STRATEGIES[strategy],
    )
    return replace(plan, **changes)


def make_record(
    plan: Plan, *, step_s: float = 2.0, launch: int = 1, noise: float = 0.02, **changes: Any
) -> TrialRecord:
    """A measured record whose steps scatter around `step_s`."""
    rng = random.Random(f"{plan.id}{launch}")
    # Full sharding keeps less, whatever the micro batch.
    states = {"zero1": 240, "zero2": 215, "fsdp2_no_reshard": 205}.get(plan.strategy, 150)
    steps = tuple(round(step_s * rng.gauss(1, noise), 6) for _ in range(8))
    record = TrialRecord(
        launch=launch,
        plan_id=plan.id,
        outcome=Outcome.OK,
        message="",
        plan=plan.to_dict(),
        tokens_per_s=64 * 512 / step_s,
        step_s=step_s,
        step_s_low=step_s * (1 - noise),
        step_s_high=step_s * (1 + noise),
        micro_step_s=step_s / plan.grad_accum_steps,
        sync_micro_step_s=step_s / plan.grad_accum_steps * 1.1,
        optimizer_step_s=0.05,
        measured_accum_steps=(1, plan.grad_accum_steps),
        peak_allocated_bytes=(states + 90 * plan.micro_batch_size) * MIB,
        peak_reserved_bytes=(states + 30 + 95 * plan.micro_batch_size) * MIB,
        alloc_retries=0,
        predicted_bytes=(states * 9 // 10 + 93 * plan.micro_batch_size) * MIB,
        predicted_step_s=step_s * 0.9,
        predicted_tokens_per_s=64 * 512 / step_s / 0.9,
        predicted_verdict="FITS",
        launch_s=3.25,
        started_at="2026-01-31T12:00:00+00:00",
        log_dir=f"launches/{launch:03d}",
        step_times_s=steps,
    )
    return replace(record, **changes)


def make_failure(
    plan: Plan, outcome: Outcome = Outcome.OOM, message: str = OOM_MESSAGE, launch: int = 1
) -> TrialRecord:
    """A record of a trial that did not run to the end."""
    return TrialRecord(
        launch=launch,
        plan_id=plan.id,
        outcome=outcome,
        message=message,
        plan=plan.to_dict(),
        predicted_bytes=900 * MIB,
        predicted_verdict="FITS",
        started_at="2026-01-31T12:01:00+00:00",
        log_dir=f"launches/{launch:03d}",
    )


def typical_records() -> list[TrialRecord]:
    """Ladders of five strategies: composed steps, a recomputed one, failures, a confirmation."""
    records = []
    bases = {"zero1": 2.4, "zero2": 2.0, "zero3": 2.9, "fsdp2": 2.2, "fsdp2_no_reshard": 2.1}
    for launch, (strategy, base) in enumerate(bases.items(), start=1):
        for micro, factor in ((1, 1.5), (2, 1.15), (4, 1.0)):
            plan = make_plan(strategy, micro)
            accums = (1, plan.grad_accum_steps) if micro == 4 else (1, 2)
            records.append(
                make_record(plan, step_s=base * factor, launch=launch, measured_accum_steps=accums)
            )
        records.append(make_failure(make_plan(strategy, 8), launch=launch))
    recomputed = make_plan("zero2", 4, recompute=Recompute.FULL)
    records.append(make_record(recomputed, step_s=2.6, launch=6))
    sequence_parallel = make_plan("zero3", 4, dp_shard=1, cp=2, grad_accum_steps=16)
    records.append(make_failure(sequence_parallel, Outcome.CRASHED, CRASH_MESSAGE, launch=7))
    records.append(make_record(make_plan("zero2", 4), step_s=2.05, launch=8))
    return records


def write_study(
    folder: Path,
    records: list[TrialRecord] | None = None,
    *,
    contract: dict[str, Any] | None = None,
    summary: dict[str, Any] | None = None,
    best_yml: str | None = "# fastest of 17\nbase_model: tiny-qwen3\nmicro_batch_size: 4\n",
) -> Path:
    """Write the files of a study that ended, unless told otherwise."""
    records = typical_records() if records is None else records
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.json").write_text(json.dumps(CONTRACT | (contract or {})))
    lines = [json.dumps(record.to_dict()) + "\n" for record in records]
    (folder / "trials.jsonl").write_text("".join(lines))
    ended = ended_summary(records) if summary is None else summary
    if ended:
        (folder / "summary.json").write_text(json.dumps(ended))
    if best_yml is not None:
        (folder / "best.yml").write_text(best_yml)
    return folder


def ended_summary(records: list[TrialRecord]) -> dict[str, Any]:
    """The summary of a search that chose the fastest plan by its last record."""
    last = {r.plan_id: r for r in records}.values()
    ran = [r for r in last if r.outcome is Outcome.OK]
    best = max(ran, key=lambda r: r.tokens_per_s or 0.0, default=None)
    return {
        "study": "tiny-qwen3-2gpu",
        "best": best
        and {
            "plan_id": best.plan_id,
            "plan": best.plan,
            "measured": {"tokens_per_s": best.tokens_per_s, "step_s": best.step_s},
        },
        "stopped_because": "no remaining configuration can beat the best by more than 2%",
        "rejected": [
            {
                "plan": make_plan("zero2", 4, cp=8).to_dict(),
                "code": "AT104",
                "reason": "cp=8 does not divide the 4 key-value heads",
            },
            {
                "plan": make_plan("zero3", 4, cp=8).to_dict(),
                "code": "AT104",
                "reason": "cp=8 does not divide the 4 key-value heads",
            },
            {
                "plan": make_plan("zero1", 32).to_dict(),
                "code": "AT201",
                "reason": "needs 3.10 GiB of 600.0 MiB",
            },
        ],
        "launches": 8,
        "elapsed_s": 412.5,
        "trials": [],
    }


CONTRACT: dict[str, Any] = {
    "schema_version": 1,
    "command": "autotune search --model tiny-qwen3 --gpus 2 --device cpu --memory-limit 700MiB",
    "model": {"name": "tiny-qwen3", "num_parameters": 13_107_456},
    "workload": {
        "seq_len": 512,
        "global_batch_size": 64,
        "optimizer": "adamw",
        "precision": "bf16",
        "packing": True,
        "mean_document_tokens": None,
        "adapter": None,
    },
    "hardware": {
        "device": "cpu",
        "gpu": "cpu",
        "num_gpus": 2,
        "memory_bytes": 8 * 2**30,
        "fingerprint": "5f1c",
    },
    "strategies": list(STRATEGIES),
    "memory_limit_bytes": 700 * MIB,
    "created": "2026-01-31T11:59:00+00:00",
    "versions": {"autotune": "0.1.0", "torch": "2.13.0+cpu", "deepspeed": "0.19.8"},
}
