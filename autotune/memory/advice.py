"""What would free device memory: neighbours of a plan, each estimated like the plan itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from autotune.memory.estimate import MemoryEstimate
from autotune.memory.setup import TraceKey, setup_of
from autotune.memory.verdict import Verdict, fit_probability, verdict
from autotune.plan import Engine, Plan, Recompute
from autotune.rules import check_plan, check_strategy
from autotune.spec.hardware import HardwareSpec
from autotune.spec.model import ModelSpec
from autotune.spec.strategy import Replicate, Strategy, load_strategies
from autotune.spec.workload import Lora, Workload

Estimator = Callable[[Workload, Plan], MemoryEstimate]


class Change(NamedTuple):
    """A plan that differs in one thing."""

    text: str
    workload: Workload
    """Another one with LoRA alone."""
    plan: Plan


@dataclass(frozen=True, kw_only=True, slots=True)
class Advice:
    """One change and what it brings."""

    change: Change
    memory: MemoryEstimate
    freed_bytes: int
    """On each device, between the expected peaks."""
    fit_probability: float
    verdict: Verdict

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "change": self.change.text,
            "freed_bytes": self.freed_bytes,
            "expected_bytes": self.memory.expected_bytes,
            "host_bytes": self.memory.host_bytes,
            "fit_probability": self.fit_probability,
            "verdict": str(self.verdict),
            "plan": self.change.plan.to_dict(),
        }


def legal_changes(
    model: ModelSpec, workload: Workload, plan: Plan, hardware: HardwareSpec
) -> list[Change]:
    """Return the single changes to a plan that may free memory and that break no rule.

    The global batch stays what it is.
    """
    strategies = load_strategies()
    found = []
    for text, other_workload, other_plan in _neighbours(model, workload, plan):
        named, strategy = _named(other_plan, strategies)
        broken = check_plan(named, model, other_workload, hardware)
        if strategy is not None:
            broken += check_strategy(strategy, other_workload, named.cp)
        if not broken:
            found.append(Change(text, other_workload, named))
    return found


def advise(
    now: MemoryEstimate, changes: Sequence[Change], hardware: HardwareSpec, estimate: Estimator
) -> list[Advice]:
    """Return the changes that lower the expected peak, the largest gain first.

    Speed is not weighed: most of them cost some.

    Args:
        now: Of the plan that would be changed.
        changes: Of `legal_changes`.
        hardware: Where it runs.
        estimate: Predicts memory, as it did for the plan.
    """
    found = []
    for change in changes:
        memory = estimate(change.workload, change.plan)
        freed = now.expected_bytes - memory.expected_bytes
        if freed <= 0:
            continue
        chance = fit_probability(memory, hardware)
        found.append(
            Advice(
                change=change,
                memory=memory,
                freed_bytes=freed,
                fit_probability=chance,
                verdict=verdict(chance),
            )
        )
    return sorted(found, key=lambda advice: (-advice.freed_bytes, advice.change.text))


def profiles_needed(
    model: ModelSpec,
    workload: Workload,
    plan: Plan,
    changes: Sequence[Change],
    hardware: HardwareSpec,
) -> list[TraceKey]:
    """Return the profiles that a plan's estimate and its advice read, to trace them together.

    All changes keep the plan's tensor-parallel degree.
    """
    cases = [(workload, plan), *((change.workload, change.plan) for change in changes)]
    return list(dict.fromkeys(setup_of(model, w, p, hardware).key for w, p in cases))


def _neighbours(
    model: ModelSpec, workload: Workload, plan: Plan
) -> Iterator[tuple[str, Workload, Plan]]:
    if plan.recompute is Recompute.NONE:
        yield "recompute activations", workload, replace(plan, recompute=Recompute.FULL)
    half, odd = divmod(plan.micro_batch_size, 2)
    if not odd:
        accumulated = 2 * plan.grad_accum_steps
        smaller = replace(plan, micro_batch_size=half, grad_accum_steps=accumulated)
        yield f"micro batch {half}, accumulation {accumulated}", workload, smaller
    if plan.grad_accum_steps > 1:
        # Gradients kept between micro-steps can weigh more than the activations of one.
        whole = plan.micro_batch_size * plan.grad_accum_steps
        at_once = replace(plan, micro_batch_size=whole, grad_accum_steps=1)
        yield f"micro batch {whole}, accumulation 1", workload, at_once
    for change, other in _shardings(plan):
        yield change, workload, other
    for change, other in _offloads(plan):
        yield change, workload, other
    # Half as many groups read sequences, so that each accumulates twice as many.
    if plan.dp_shard % 2 == 0:
        split = replace(
            plan,
            cp=2 * plan.cp,
            dp_shard=plan.dp_shard // 2,
            grad_accum_steps=2 * plan.grad_accum_steps,
        )
        yield f"sequence parallel {split.cp}", workload, split
    if workload.adapter is None:
        lora = Lora(target_modules=tuple(model.linears))
        yield f"LoRA r={lora.r}", workload.model_copy(update={"adapter": lora}), plan


def _shardings(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """Spread the states further: higher ZeRO stages, or FSDP2's own steps and ZeRO-3."""
    match plan.engine:
        case Engine.DDP:
            sharded = replace(plan, dp_replicate=1, dp_shard=plan.dp_replicate)
            for stage in (1, 2, 3):
                zero = replace(sharded, engine=Engine.DEEPSPEED, zero_stage=stage)
                yield f"ZeRO-{stage}", zero
            yield "FSDP2", replace(sharded, engine=Engine.FSDP2)
        case Engine.DEEPSPEED:
            for stage in range(plan.zero_stage + 1, 4):
                yield f"ZeRO-{stage}", replace(plan, zero_stage=stage)
        case Engine.FSDP2:
            if not plan.reshard_after_forward:
                yield "reshard after forward", replace(plan, reshard_after_forward=True)
            if plan.dp_replicate > 1:
                shards = plan.dp_replicate * plan.dp_shard
                yield "shard over all ranks", replace(plan, dp_replicate=1, dp_shard=shards)
            elif not plan.offload_params:
                zero3 = replace(plan, engine=Engine.DEEPSPEED, zero_stage=3)
                yield "ZeRO-3", replace(zero3, reshard_after_forward=True)


def _offloads(plan: Plan) -> Iterator[tuple[str, Plan]]:
    if plan.engine is Engine.DEEPSPEED:
        if not plan.offload_optimizer:
            yield "offload the optimizer", replace(plan, offload_optimizer=True)
        if not plan.offload_params and plan.zero_stage == 3:
            both = replace(plan, offload_optimizer=True, offload_params=True)
            yield "offload optimizer and parameters", both
    elif plan.engine is Engine.FSDP2 and not plan.offload_params:
        yield "offload all states", replace(plan, offload_optimizer=True, offload_params=True)


def _named(plan: Plan, strategies: list[Strategy]) -> tuple[Plan, Strategy | None]:
    """Name a plan after the strategy that lays it out so, where one ships."""
    for strategy in strategies:
        same = all(
            getattr(strategy, name) == getattr(plan, name)
            for name in (
                "engine", "zero_stage", "reshard_after_forward", "offload_optimizer",
                "offload_params",
            )
        )  # fmt: skip
        hybrid = plan.engine is Engine.FSDP2 and plan.dp_replicate > 1
        if same and hybrid == (strategy.replicate is Replicate.HYBRID):
            return replace(plan, strategy=strategy.name), strategy
    return plan, None
