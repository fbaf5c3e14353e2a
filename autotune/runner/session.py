"""What trials and full runs share on a rank: groups, data, limits, and the assembled trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments

from autotune.plan import CpBackend, Plan
from autotune.resources import cache_dir
from autotune.runner.answer import Answer
from autotune.runner.checks import CheckCallback
from autotune.runner.compiling import compile_layers
from autotune.runner.data import TrainingData, build_sequences
from autotune.runner.data.loader import EvalLoader, RankLoader, StepOrder
from autotune.runner.data.packing import Sequences
from autotune.runner.engines import apply_numerics, enable_recompute, start_process_group
from autotune.runner.float8 import apply_float8, gather_in_float8
from autotune.runner.gauges import Gauge, make_gauge
from autotune.runner.imports import import_everything
from autotune.runner.liger import apply_liger
from autotune.runner.models import build_model
from autotune.runner.ring_package import load_ring_package
from autotune.runner.tensor_parallel import split_model
from autotune.runner.timers import StepTimer
from autotune.runner.trainer import AutotuneTrainer
from autotune.runner.ulysses import CONTEXT, make_sequence_groups
from autotune.trial.protocol import Request


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """A rank with its process groups, data and memory limit in place, before the model."""

    request: Request
    plan: Plan
    answer: Answer
    gauge: Gauge
    data: TrainingData

    @property
    def place(self) -> dict[str, int]:
        """Where this rank stands among data-parallel and sequence-parallel ranks."""
        rank, plan = self.answer.rank, self.plan
        # The ranks of a tensor-parallel group, the innermost, read the same.
        return {
            "dp_rank": rank // (plan.cp * plan.tp),
            "dp_size": plan.data_parallel_size,
            "cp_rank": rank // plan.tp % plan.cp,
            "cp_size": plan.cp,
        }

    def train_loader(
        self, start_step: int = 0, *, sequences: Sequences | None = None
    ) -> RankLoader:
        """Return the loader of this rank, at the plan's split; of other sequences where given."""
        plan, sequences = self.plan, sequences or self.data.train
        return RankLoader(
            sequences,
            StepOrder(len(sequences), plan.global_batch_size, seed=self.request.seed),
            micro_batch_size=plan.micro_batch_size,
            grad_accum_steps=plan.grad_accum_steps,
            start_step=start_step,
            **self.place,
        )

    def eval_loader(self) -> EvalLoader | None:
        """Return the loader of the held-out sequences, if there are any."""
        if self.data.validation is None:
            return None
        settings = self.request.train
        size = (settings.eval_batch_size if settings else None) or self.plan.micro_batch_size
        return EvalLoader(self.data.validation, micro_batch_size=size, **self.place)


def open_session(request: Request, answer: Answer) -> Session:
    """Start the process groups, read the data, note the baseline, set the memory limit.

    The baseline comes after imports and data, so that the limit holds for model and training.
    """
    import_everything()
    answer.imported()
    plan = request.plan_object()
    start_process_group(request, plan)
    _set_attention(plan, request.device)
    data = build_sequences(request, cache_dir() / "tokenized")
    answer.result.data = data.counts
    gauge = make_gauge(request.device)
    gauge.set_baseline()
    answer.result.baseline_bytes = gauge.baseline_bytes
    if request.memory_limit_bytes is not None:
        gauge.limit(request.memory_limit_bytes)
    return Session(request=request, plan=plan, answer=answer, gauge=gauge, data=data)


def _set_attention(plan: Plan, device: str) -> None:
    """Make the sequence groups and tell the attention function how they see whole sequences."""
    CONTEXT.cp, CONTEXT.group = plan.cp, make_sequence_groups(plan.cp, plan.tp)
    CONTEXT.ring = plan.cp > 1 and plan.cp_backend is CpBackend.RING
    CONTEXT.heads_k_stride = plan.heads_k_stride
    if CONTEXT.ring:
        load_ring_package(device)  # a missing package is said before a model is built


def make_trainer(
    session: Session,
    arguments: Callable[[], TrainingArguments],
    *,
    loader: Any,
    timer: StepTimer,
    eval_loader: EvalLoader | None = None,
) -> AutotuneTrainer:
    """Build model and trainer, with the numerics contract and the checks in place.

    Args:
        session: the rank.
        arguments: makes the arguments; called before the model is built, because DeepSpeed's
            ZeRO-3 shards the model while it is built if its configuration exists by then.
        loader: an endless iterable of rank-local micro-batches.
        timer: times the steps.
        eval_loader: held-out micro-batches.
    """
    request, plan = session.request, session.plan
    made = arguments()
    model = build_model(request, plan)
    if made.parallelism_config is not None:
        with session.gauge.uncounted():
            made.parallelism_config.get_device_mesh(request.device)
        if plan.tp > 1:
            split_model(model, made.parallelism_config, request.device)
    apply_liger(model, request.workload.liger)
    apply_float8(model, request.workload, request.device)
    enable_recompute(model, plan)
    if request.train is not None and request.train.torch_compile:
        compile_layers(model)
    trainer = AutotuneTrainer(
        model=model,
        args=made,
        plan=plan,
        loader=loader,
        timer=timer,
        workload=request.workload,
        enter=session.answer.enter,
        eval_loader=eval_loader,
    )
    apply_numerics(trainer, request, plan)
    gather_in_float8(trainer, request.workload, request.device)
    trainer.add_callback(CheckCallback(trainer, request, session.answer.add_asserted))
    return trainer
