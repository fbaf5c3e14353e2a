"""A sampled space of plans: every strategy that ships, laid out every way the rules allow.

And what no shipped strategy has: ZeRO++'s second copy, rings of every stride, buckets of one's own.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

from autotune.emit.job import Job
from autotune.plan import CpBackend, Engine, Plan, Recompute
from autotune.planner import make_plan
from autotune.rules import check_plan, check_strategy
from autotune.spec.hardware import load_hardware
from autotune.spec.model import load_model
from autotune.spec.strategy import load_strategies
from autotune.spec.training import DatasetSource, TrainSettings
from autotune.spec.workload import BaseStorage, LigerKernel, Lora, Precision, Workload

SEED = 20
COUNT = 500
MODEL = load_model("tiny-qwen3")  # 4 key-value heads
ADAPTERS = [
    Lora(r=8),
    Lora(r=8, rslora=True),
    Lora(r=8, dora=True),
    *(Lora(r=8, base_storage=storage) for storage in BaseStorage),
]
LIGER = tuple(LigerKernel)
DATASETS = (DatasetSource(path="corpus.jsonl"),)


def sample_jobs(count: int = COUNT, seed: int = SEED) -> list[Job]:
    """Draw `count` different legal plans, each with a workload of its own."""
    drawn: dict[str, Job] = {}
    jobs = _draws(random.Random(seed))
    while len(drawn) < count:
        job = next(jobs)
        drawn.setdefault(job.plan.id, job)
    return list(drawn.values())


def _draws(chance: random.Random) -> Iterator[Job]:
    strategies = load_strategies(None)
    while True:
        strategy = chance.choice(strategies)
        hardware = load_hardware("h100-sxm", chance.choice([1, 2, 3, 4, 6, 8, 16]), None)
        cp = chance.choice([1, 1, 2, 4])
        # The rules refuse it elsewhere: the draw would be lost.
        tp = chance.choice([1, 1, 2, 4]) if strategy.engine is Engine.FSDP2 else 1
        plan = make_plan(
            strategy,
            hardware,
            tp=tp,
            cp=cp,
            cp_backend=chance.choice(list(CpBackend)) if cp > 1 else CpBackend.ULYSSES,
            recompute=chance.choice(list(Recompute)),
            micro_batch_size=chance.choice([1, 2, 3, 4, 8]),
            grad_accum_steps=chance.choice([1, 2, 3, 8, 17]),
        )
        if plan.engine is Engine.DEEPSPEED:
            plan = replace(plan, bucket_elements=chance.choice([0, 0, 1_000_000, 12_345]))
        if plan.strategy == "zero3" and chance.random() < 0.5:
            plan = _with_second_copy(plan, chance.choice([2, 4]))
        workload = Workload(
            seq_len=chance.choice([512, 4096]),
            global_batch_size=plan.global_batch_size,
            optimizer=chance.choice(["adamw", "sgd", "adamw_8bit", "paged_adamw_8bit"]),
            precision=chance.choice(list(Precision)),
            packing=chance.random() < 0.5,
            adapter=chance.choice(ADAPTERS) if chance.random() < 0.3 else None,
            liger=chance.choice([(), (), LIGER[:2], LIGER]),
            chunked_loss=chance.random() < 0.2,
            activation_offloading=chance.random() < 0.2,
            fp8=chance.random() < 0.2,
        )
        if plan.cp_backend is CpBackend.RING and workload.packing:
            plan = replace(plan, heads_k_stride=chance.choice([1, 2, 4]))
        broken = check_plan(plan, MODEL, workload, hardware)
        if broken or check_strategy(strategy, workload, plan.cp):
            continue
        yield Job(
            base_model="tiny-qwen3",
            model=MODEL,
            workload=workload,
            plan=plan,
            train=TrainSettings(max_grad_norm=chance.choice([0.5, 1.0])),
            datasets=DATASETS,
        )


def _with_second_copy(plan: Plan, ranks: int) -> Plan:
    """Return a ZeRO-3 plan with ZeRO++'s second copy, under the name such a file gets."""
    return replace(plan, hpz=ranks, strategy=f"zero3_hpz{ranks}")
