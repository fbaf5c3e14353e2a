"""The rungs below a plan, at the same global batch.

The order is that of Axolotl's guide: a smaller micro batch with more accumulation, recomputation,
offload. Every rung keeps engine, stage and layout, because checkpoints do not cross them.

Which comes next depends on what ran out: a step needs less on each of them, loading only where
another part of the states is on the device, evaluation with a smaller batch of its own, saving on
none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from autotune.config import LadderRung, fallback_ladder
from autotune.errors import AutotuneError
from autotune.memory.advice import advise, legal_changes
from autotune.plan import Engine, Plan, Recompute
from autotune.planner import predict_memory
from autotune.rules import check_plan
from autotune.spec.hardware import HardwareSpec
from autotune.spec.model import ModelSpec
from autotune.spec.workload import Workload
from autotune.trial.protocol import Phase
from autotune.units import format_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One rung further down."""

    plan: Plan
    change: str
    """Against the plan before it."""
    freed_bytes: int | None
    """On each device, predicted; None where nothing could be predicted."""
    eval_batch_size: int | None = None
    """Where evaluation ran out: what it goes on with."""

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        lowered = self.eval_batch_size
        return {
            "plan": self.plan.to_dict(),
            "change": self.change,
            "freed_bytes": self.freed_bytes,
            **({} if lowered is None else {"eval_batch_size": lowered}),
        }

    def words(self) -> str:
        """Say the change and what it brings: ``micro batch 2 instead of 4 frees 11.30 GiB``."""
        if self.freed_bytes is None:
            return self.change
        return f"{self.change} frees {format_bytes(self.freed_bytes)} (predicted)"


@dataclass(kw_only=True)
class Ladder:
    """The rungs below a plan; each is given once."""

    model: ModelSpec
    workload: Workload
    hardware: HardwareSpec
    rungs: list[Plan]

    def next(
        self, failed: Plan, phase: Phase = Phase.STEP, eval_batch_size: int = 1
    ) -> Step | None:
        """Return the next rung that is predicted to need less than the one that failed.

        A prediction may be wrong in size; a rung is skipped only where it frees nothing.

        Args:
            failed: What ran out of memory.
            phase: What it was at then.
            eval_batch_size: Sequences of its evaluation steps, on each data-parallel rank.
        """
        if phase is Phase.SAVE:
            return None
        if phase is Phase.EVALUATE and eval_batch_size > 1:
            half = eval_batch_size // 2
            change = f"eval_batch_size {half} instead of {eval_batch_size}"
            return Step(plan=failed, change=change, freed_bytes=None, eval_batch_size=half)
        if phase is not Phase.STEP:
            self._offload_from(failed)
        while self.rungs:
            plan = self.rungs.pop(0)
            freed = self._freed_bytes(failed, plan)
            if freed is None or freed > 0:
                return Step(plan=plan, change=_change(failed, plan), freed_bytes=freed)
        return None

    def _offload_from(self, failed: Plan) -> None:
        """Leave the rungs that load less than the plan: itself with offload, and those below it."""
        less = []
        for plan in () if failed.offload_params else (failed, *self.rungs):
            less += [plan] if plan.offload_params else _offloaded(plan, self.hardware)
        self.rungs = [
            plan
            for plan in dict.fromkeys(less)
            if not check_plan(plan, self.model, self.workload, self.hardware)
        ]

    def beyond(self, failed: Plan, phase: Phase = Phase.STEP) -> str:
        """Say what would free more and why the run cannot go on there by itself."""
        changes = legal_changes(self.model, self.workload, failed, self.hardware)
        others = [change for change in changes if _another_checkpoint(failed, change.plan)]
        try:
            now = self._memory(self.workload, failed)
            found = advise(now, others, self.hardware, self._memory)
        except AutotuneError:
            found = []
        start = "Nothing further down keeps this run's checkpoints."
        if phase is Phase.LOAD:
            start = "No rung further down loads less."
        if not found:
            return f"{start} Use more GPUs, a shorter sequence_len or an adapter, from the start."
        best = found[0]
        return (
            f"{start} {best.change.text} would free {format_bytes(best.freed_bytes)} (predicted), "
            f"but a checkpoint of {_kind(failed)} cannot be read by {_kind(best.change.plan)}: "
            "start anew with it in another --output-dir, from base_model or from weights this run "
            "has finished."
        )

    def _memory(self, workload: Workload, plan: Plan) -> Any:
        return predict_memory(self.model, workload, plan, self.hardware)

    def _freed_bytes(self, before: Plan, after: Plan) -> int | None:
        try:
            now, then = (self._memory(self.workload, plan) for plan in (before, after))
        except AutotuneError:  # a model that cannot be traced here still trains
            return None
        freed: int = now.expected_bytes - then.expected_bytes
        return freed


def ladder_below(
    plan: Plan,
    model: ModelSpec,
    workload: Workload,
    hardware: HardwareSpec,
    given: Sequence[LadderRung] = (),
) -> Ladder:
    """Return the ladder of a plan.

    Args:
        plan: What is trained.
        model: The model.
        workload: Its contract.
        hardware: Where it runs.
        given: Rungs of the file (`autotune.ladder`); those of another global batch, or not below
            the plan, are left out. Without any, `fallback_ladder` has them.
    """
    product = plan.micro_batch_size * plan.grad_accum_steps
    rungs = [_at(plan, rung) for rung in given or fallback_ladder(plan)]
    below = [
        rung for rung in rungs
        if rung.micro_batch_size * rung.grad_accum_steps == product and _is_below(rung, plan)
    ]  # fmt: skip
    lowest = below[-1] if below else plan
    below += _offloaded(lowest, hardware)
    legal = [rung for rung in below if not check_plan(rung, model, workload, hardware)]
    return Ladder(model=model, workload=workload, hardware=hardware, rungs=legal)


def _at(plan: Plan, rung: LadderRung) -> Plan:
    return replace(
        plan,
        micro_batch_size=rung.micro_batch_size,
        grad_accum_steps=rung.gradient_accumulation_steps,
        recompute=Recompute.FULL if rung.gradient_checkpointing else plan.recompute,
    )


def _is_below(rung: Plan, plan: Plan) -> bool:
    more = rung.recompute is Recompute.FULL and plan.recompute is Recompute.NONE
    return rung.micro_batch_size < plan.micro_batch_size or (
        more and rung.micro_batch_size == plan.micro_batch_size
    )


def _offloaded(plan: Plan, hardware: HardwareSpec) -> list[Plan]:
    """Return the offload whose run reads the plan's checkpoints; CPU ranks would gain nothing."""
    if hardware.gpu.is_cpu or plan.offload_params:
        return []
    if plan.engine is Engine.FSDP2:
        name = f"{plan.strategy}_offload"
        return [replace(plan, strategy=name, offload_optimizer=True, offload_params=True)]
    return []


def _change(before: Plan, after: Plan) -> str:
    parts = []
    if after.micro_batch_size != before.micro_batch_size:
        parts.append(f"micro batch {after.micro_batch_size} instead of {before.micro_batch_size}")
    if after.recompute is not before.recompute:
        parts.append("recomputation of activations")
    if after.offload_params != before.offload_params:
        parts.append("offload of all states")
    return " with ".join(parts)


def _another_checkpoint(plan: Plan, other: Plan) -> bool:
    def layout(one: Plan) -> tuple[object, ...]:
        return one.engine, one.zero_stage, one.cp, one.tp

    return layout(plan) != layout(other)


def _kind(plan: Plan) -> str:
    if plan.engine is Engine.DEEPSPEED:
        return f"ZeRO-{plan.zero_stage}"
    return {Engine.DDP: "DDP", Engine.FSDP2: "FSDP2"}[plan.engine]
