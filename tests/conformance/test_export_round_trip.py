"""import(export(plan)) == plan over 500 sampled plans, but for what a target has no word for."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import pytest

from autotune.config.foreign import FileKind, StartingPoint, load_any
from autotune.emit.job import PLAN_KEYS, Job
from autotune.emit.targets import export
from autotune.errors import AutotuneError
from autotune.plan import CpBackend, Engine, Plan
from autotune.spec.strategy import load_strategies
from autotune.spec.workload import Precision
from tests.conformance.plan_samples import COUNT, sample_jobs

JOBS = sample_jobs()
FIELDS = [field.name for field in fields(Plan)]

RING = {"cp_backend", "heads_k_stride"}
# What each target may lose, by engine. Everything else comes back.
MAY_LOSE = {
    ("axolotl", Engine.DDP): {"micro_batch_size", "grad_accum_steps"},  # cp with packing
    ("axolotl", Engine.DEEPSPEED): {"micro_batch_size", "grad_accum_steps"},  # likewise
    ("axolotl", Engine.FSDP2): {"micro_batch_size", "grad_accum_steps"},  # likewise
    ("accelerate", Engine.DDP): {"micro_batch_size", "grad_accum_steps", "recompute"},
    ("accelerate", Engine.FSDP2): {"micro_batch_size", "grad_accum_steps", *RING},
    ("accelerate", Engine.DEEPSPEED): {"recompute", *RING},
    ("deepspeed", Engine.DEEPSPEED): {"recompute", *RING},
}
KINDS = {
    "axolotl": FileKind.AXOLOTL,
    "accelerate": FileKind.ACCELERATE,
    "deepspeed": FileKind.DEEPSPEED,
}


def cannot(job: Job, target: str) -> bool:
    """Say whether the target has to refuse the plan as a whole."""
    plan = job.plan
    if target == "deepspeed":
        return plan.engine is not Engine.DEEPSPEED
    alone = plan.data_parallel_size == 1 and target == "axolotl"
    return plan.engine is Engine.DDP and plan.cp > 1 and not alone


def test_the_sample_covers_the_space():
    plans = [job.plan for job in JOBS]
    assert len(plans) == len({plan.id for plan in plans}) == COUNT
    shipped = {strategy.name for strategy in load_strategies(None)}
    assert {plan.strategy for plan in plans} == shipped | {"zero3_hpz2", "zero3_hpz4"}
    for name in ("tp", "cp", "recompute", "micro_batch_size", "grad_accum_steps", "bucket_elements",
                 "dp_replicate", "dp_shard", "offload_params", "offload_optimizer",
                 "reshard_after_forward", "zero_stage", "hpz", "cp_backend",
                 "heads_k_stride"):  # fmt: skip
        assert len(Counter(getattr(plan, name) for plan in plans)) > 1, name
    assert {plan.cp for plan in plans if plan.engine is Engine.DEEPSPEED} == {1, 2, 4}
    assert {plan.tp for plan in plans if plan.engine is Engine.FSDP2} == {1, 2, 4}


@pytest.mark.parametrize(
    "count", [pytest.param(60, id="60"), pytest.param(COUNT, marks=pytest.mark.slow, id="all")]
)
@pytest.mark.parametrize("target", KINDS)
def test_plans_come_back(target, count, tmp_path):
    jobs = JOBS[:count]
    came_back, lost_somewhere = 0, set()
    for job in jobs:
        plan = job.plan
        if cannot(job, target):
            with pytest.raises(AutotuneError):
                export(job, target)
            continue
        done = export(job, target)
        read = import_(done.files, tmp_path, target, plan.world_size)
        assert read.kind is KINDS[target]
        got = read.config.plan(plan.world_size)
        differing = {name for name in FIELDS if getattr(got, name) != getattr(plan, name)}
        assert differing == set(done.lost), plan
        assert differing <= MAY_LOSE[target, plan.engine]
        warned = " ".join(done.warnings)
        for name in differing:
            assert PLAN_KEYS[name] in warned, (name, done.warnings)
        lost_somewhere |= {(plan.engine, name) for name in differing}
        came_back += 1
    assert came_back == sum(not cannot(job, target) for job in jobs) > 0.4 * count
    if count == COUNT:
        assert lost_somewhere == {
            (engine, name)
            for (tool, engine), names in MAY_LOSE.items()
            if tool == target
            for name in names
        }


@pytest.mark.parametrize("target", KINDS)
def test_precision_clipping_and_ranks_come_back(target, tmp_path):
    for job in JOBS[:25]:
        if cannot(job, target):
            continue
        done = export(job, target)
        read = import_(done.files, tmp_path, target, None)
        config = read.config
        assert config.contract.precision is job.workload.precision
        if target != "axolotl":
            assert read.num_gpus == job.plan.world_size
        if job.plan.engine is Engine.DEEPSPEED:
            assert config.train.max_grad_norm == job.train.max_grad_norm


def test_what_a_file_leaves_open_can_be_said(tmp_path):
    """The lost fields of the accelerate target, given beside the file, make the plan whole.

    All but the ring: no flag asks for it, and the import's warning names the key that does.
    """
    named = [job for job in JOBS if job.plan.cp_backend is CpBackend.ULYSSES]
    for job in [job for job in named if not cannot(job, "accelerate")][:25]:
        plan = job.plan
        done = export(job, "accelerate")
        start = StartingPoint(
            model="tiny-qwen3",
            num_gpus=plan.world_size,
            micro_batch_size=plan.micro_batch_size if "micro_batch_size" in done.lost else None,
            grad_accum_steps=plan.grad_accum_steps if "grad_accum_steps" in done.lost else None,
            gradient_checkpointing=True if "recompute" in done.lost else None,
        )
        assert load_any(write(done.files, tmp_path), start).config.plan(plan.world_size) == plan


def test_a_lost_field_left_unnamed_would_be_found(tmp_path):
    """The check above against an export that drops the offload."""
    job = next(job for job in JOBS if job.plan.offload_params)
    broken = job.with_plan(replace(job.plan, offload_params=False, offload_optimizer=False))
    read = import_(export(broken, "axolotl").files, tmp_path, "axolotl", job.plan.world_size)
    assert read.config.plan(job.plan.world_size) != job.plan


def import_(files, folder: Path, target: str, num_gpus: int | None):
    model = None if target == "axolotl" else "tiny-qwen3"
    return load_any(write(files, folder), StartingPoint(model=model, num_gpus=num_gpus))


def write(files, folder: Path) -> Path:
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder / next(iter(files))


def test_both_precisions_are_sampled():
    assert {job.workload.precision for job in JOBS} == set(Precision)
