"""After out-of-memory: the next configuration down at the same global batch, from the checkpoint.

The order is that of Axolotl's guide: a smaller micro batch with more accumulation, recomputation,
offload. Every rung keeps engine, stage and layout, because checkpoints do not cross them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from autotune.config import LadderRung, fallback_ladder
from autotune.errors import AutotuneError
from autotune.memory.advice import advise, legal_changes
from autotune.plan import Engine, Plan, Recompute
from autotune.planner import predict_memory
from autotune.rules import check_plan
from autotune.spec.hardware import HardwareSpec
from autotune.spec.model import ModelSpec
from autotune.spec.workload import Workload
from autotune.training import Trained, TrainLog, train, write_run_file
from autotune.trial.checkpoint import IDENTITY_FILE, checkpoints_of, is_whole, step_of
from autotune.trial.protocol import LOG_FILE, Outcome, Request
from autotune.trial.ranks import Starter
from autotune.trial.run_log import cut_log
from autotune.units import format_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One rung further down."""

    plan: Plan
    change: str
    """Against the plan before it."""
    freed_bytes: int | None
    """On each device, predicted; None where nothing could be predicted."""

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
    taken: list[Step] = field(default_factory=list)

    def next(self, failed: Plan) -> Step | None:
        """Return the next rung that is predicted to need less than the one that failed.

        A prediction may be wrong in size; a rung is skipped only where it frees nothing.
        """
        while self.rungs:
            plan = self.rungs.pop(0)
            freed = self._freed_bytes(failed, plan)
            if freed is None or freed > 0:
                step = Step(plan=plan, change=_change(failed, plan), freed_bytes=freed)
                self.taken.append(step)
                return step
        return None

    def beyond(self, failed: Plan) -> str:
        """Say what would free more and why the run cannot go on there by itself."""
        changes = legal_changes(self.model, self.workload, failed, self.hardware)
        others = [change for change in changes if _another_checkpoint(failed, change.plan)]
        try:
            now = self._memory(self.workload, failed)
            found = advise(now, others, self.hardware, self._memory)
        except AutotuneError:
            found = []
        start = "Nothing further down keeps this run's checkpoints."
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


def train_down(
    request: Request,
    ladder: Ladder | None,
    stream: TextIO,
    starter: Starter | None = None,
    *,
    run: Callable[[Request, TrainLog, Starter | None], Trained] = train,
) -> Trained:
    """Train; after each out-of-memory go a rung down and on from the last checkpoint.

    Args:
        request: Of the run.
        ladder: Where to go; None stops at the first out-of-memory.
        stream: Where the log is shown.
        starter: As in `autotune.training.train`.
        run: What trains.
    """
    older = _later_checkpoints(request)
    while True:
        assert request.train is not None
        resumed = request.train.resume_from
        step = step_of(Path(resumed)) if resumed else None
        log = TrainLog(Path(request.out_dir), stream, step)
        log.announce(request)
        ended = run(request, log, starter)
        taken = [] if ladder is None else ladder.taken
        ended.document["ladder"] = [
            {"plan": each.plan.to_dict(), "change": each.change, "freed_bytes": each.freed_bytes}
            for each in taken
        ]
        write_run_file(Path(request.out_dir), ended.document)
        if ladder is None or not _out_of_memory(ended, request):
            return ended
        failed = request.plan_object()
        next_step = ladder.next(failed)
        if next_step is None:
            stopped = ended.message.partition(" Lower micro_batch_size")[0]
            return replace(ended, message=f"{stopped} {ladder.beyond(failed)}")
        request = lowered(request, next_step.plan, older)
        stream.write(f"Out of memory. Next: {next_step.words()}; {_from_where(request)}.\n")


def lowered(request: Request, plan: Plan, older: Mapping[Path, int] | None = None) -> Request:
    """Return the request of a rung below: from the last whole checkpoint, if there is one.

    Without one the run starts again, and the log of the steps before is set aside.

    Args:
        request: Of the run that ran out of memory.
        plan: Of the rung.
        older: What `_later_checkpoints` found before the run.
    """
    assert request.train is not None
    out_dir = Path(request.out_dir)
    still_there = {path for path, time in (older or {}).items() if _written_at(path) == time}
    whole = [p.resolve() for _, p in checkpoints_of(out_dir) if is_whole(p)]
    own = [path for path in whole if path not in still_there]
    checkpoint = str(own[-1]) if own else request.train.resume_from or ""
    if not checkpoint:
        cut_log(out_dir / LOG_FILE, -1)
    changes: dict[str, Any] = {"resume_from": checkpoint or None}
    if request.train.eval_batch_size is not None:
        size = min(request.train.eval_batch_size, plan.micro_batch_size)
        changes["eval_batch_size"] = size
    settings = request.train.model_copy(update=changes)
    return request.model_copy(update={"plan": plan.to_dict(), "train": settings})


def _later_checkpoints(request: Request) -> dict[Path, int]:
    """Return the checkpoints after the one the user goes on from, and when they were written.

    The ranks set them aside at the first step; out of memory before it, they are still there, and
    the run would go on from what was to be trained anew.
    """
    assert request.train is not None
    if request.train.resume_from is None:
        return {}
    step = step_of(Path(request.train.resume_from))
    found = checkpoints_of(Path(request.out_dir))
    return {path.resolve(): _written_at(path) for later, path in found if later > step}


def _written_at(checkpoint: Path) -> int:
    """Return the time its last file was written, in ns; 0 where it is not whole or not there."""
    file = checkpoint / IDENTITY_FILE
    return file.stat().st_mtime_ns if file.is_file() else 0


def _from_where(request: Request) -> str:
    assert request.train is not None
    if request.train.resume_from is None:
        return "there is no checkpoint yet, so it starts again"
    return f"it goes on from {Path(request.train.resume_from).name}"


def _out_of_memory(ended: Trained, request: Request) -> bool:
    outcome = ended.document.get("outcome")
    # On CPU ranks the device is the host: what the kernel kills there is the ranks' own.
    host = outcome == Outcome.HOST_OOM and request.device == "cpu"
    return outcome == Outcome.OOM or host


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
