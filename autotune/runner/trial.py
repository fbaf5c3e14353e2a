"""A trial on this rank: build, check, climb the ladder."""

from __future__ import annotations

from autotune.plan import Engine, Plan
from autotune.resources import cache_dir
from autotune.runner.answer import Answer
from autotune.runner.checks import CheckCallback
from autotune.runner.data import build_sequences
from autotune.runner.data.loader import RankLoader, StepOrder
from autotune.runner.engines import (
    apply_numerics,
    enable_recompute,
    start_process_group,
    training_arguments,
)
from autotune.runner.gauges import Gauge, make_gauge, memory_outcome
from autotune.runner.ladder import Ladder, LadderLoader
from autotune.runner.models import build_model
from autotune.runner.timers import StepTimer
from autotune.runner.trainer import AutotuneTrainer
from autotune.runner.ulysses import CONTEXT, make_sequence_groups
from autotune.trial.protocol import Outcome, Request, RungResult, TrainSettings

_ENDLESS = 10**6
"""Optimizer steps the Trainer is told of; the ladder ends it long before."""


def run_trial(request: Request, answer: Answer) -> None:
    """Measure every rung of the request, writing each as it finishes.

    A rung that runs out of memory ends the ladder: larger micro batches need more.
    """
    plan = request.plan_object()
    gauge = prepare_device(request, plan, answer)
    start_process_group(request, plan)
    CONTEXT.cp, CONTEXT.group = plan.cp, make_sequence_groups(plan.cp)

    timer = StepTimer(gauge)
    ladder = Ladder(
        request.rungs,
        request.measurement,
        timer=timer,
        gauge=gauge,
        report=answer.add_rung,
        progress=answer.heartbeat,
    )
    try:
        trainer = _build(request, plan, answer, ladder, timer)
        trainer.train()
    except Exception as error:
        outcome = memory_outcome(error)
        if outcome is not None:
            answer.add_rung(_out_of_memory(ladder, outcome, error))
        raise


def prepare_device(request: Request, plan: Plan, answer: Answer) -> Gauge:
    """Import what the engine needs, note the memory that took, and set the limit."""
    if plan.engine is Engine.DEEPSPEED:
        import deepspeed  # noqa: F401  (part of the baseline, not of the model's memory)
    gauge = make_gauge(request.device)
    gauge.set_baseline()
    answer.result.baseline_bytes = gauge.baseline_bytes
    if request.memory_limit_bytes is not None:
        gauge.limit(request.memory_limit_bytes)
    return gauge


def _build(
    request: Request, plan: Plan, answer: Answer, ladder: Ladder, timer: StepTimer
) -> AutotuneTrainer:
    arguments = training_arguments(
        request,
        plan,
        TrainSettings(learning_rate=1e-4, lr_scheduler="constant"),
        max_steps=_ENDLESS,
        save_strategy="no",
        logging_strategy="no",
    )
    data = build_sequences(request, cache_dir() / "tokenized")
    loader = RankLoader(
        data.train,
        StepOrder(len(data.train), plan.global_batch_size, seed=request.seed),
        micro_batch_size=plan.micro_batch_size,
        grad_accum_steps=plan.grad_accum_steps,
        dp_rank=answer.rank // plan.cp,
        dp_size=plan.data_parallel_size,
        cp_rank=answer.rank % plan.cp,
        cp_size=plan.cp,
    )
    model = build_model(request, plan)
    enable_recompute(model, plan)
    trainer = AutotuneTrainer(
        model=model,
        args=arguments,
        plan=plan,
        loader=LadderLoader(loader, ladder.start_segment),
        timer=timer,
        packed=request.workload.packing,
    )
    apply_numerics(trainer, request, plan)
    trainer.add_callback(CheckCallback(trainer, request, answer.add_asserted))
    trainer.add_callback(ladder)
    ladder.trainer = trainer
    return trainer


def _out_of_memory(ladder: Ladder, outcome: Outcome, error: BaseException) -> RungResult:
    segment = ladder.current
    return RungResult(
        micro_batch_size=segment.micro_batch_size,
        outcome=outcome,
        message=f"at accumulation {segment.grad_accum_steps}: {str(error).splitlines()[0]}",
        accumulations=ladder.finished_of_current_rung,
    )
