"""A full run on this rank: the trial's path, with weights, evaluation and checkpoints."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from autotune.runner.answer import Answer
from autotune.runner.data import TrainingData
from autotune.runner.data.loader import steps_for_epochs
from autotune.runner.engines import training_arguments
from autotune.runner.gauges import peak_resident_bytes
from autotune.runner.session import make_trainer, open_session
from autotune.runner.timers import StepTimer
from autotune.runner.trainer import AutotuneTrainer
from autotune.spec.training import TrainSettings
from autotune.spec.workload import Precision
from autotune.trial.checkpoint import (
    check_identity,
    identity_of,
    set_aside_later,
    step_of,
    write_identity,
)
from autotune.trial.protocol import LOG_FILE, Phase, Request
from autotune.trial.run_log import cut_log


def run_training(request: Request, answer: Answer) -> None:
    """Train to the end of the request's settings; write checkpoints, logs and final weights.

    Raises:
        AutotuneError: unusable data, weights or checkpoint.
    """
    settings = request.train
    assert settings is not None
    session = open_session(request, answer)
    data = session.data
    identity = identity_of(request, data.train.digest())
    start_step = _resumed_step(settings.resume_from, identity)
    total = settings.max_steps or steps_for_epochs(
        len(data.train), session.plan.global_batch_size, settings.num_epochs
    )
    trainer = make_trainer(
        session,
        lambda: training_arguments(
            request, session.plan, settings, **_schedule(settings, data, start_step, total)
        ),
        loader=session.train_loader(start_step),
        timer=StepTimer(session.gauge, enabled=False),
        eval_loader=session.eval_loader(),
    )
    steps_per_epoch = len(data.train) / session.plan.global_batch_size
    trainer.add_callback(
        RunLog(request, answer, trainer, steps_per_epoch, identity, settings.save_total_limit)
    )
    answer.result.train["host_peak_bytes_after_load"] = peak_resident_bytes()
    trainer.train(resume_from_checkpoint=settings.resume_from)
    if data.validation is not None and trainer.last_evaluated_step != trainer.state.global_step:
        trainer.evaluate()
    if settings.save_final_weights:
        answer.enter(Phase.SAVE)
        _save_final_weights(trainer, request, data)
    answer.result.train |= {
        "steps": trainer.state.global_step,
        "sequences": len(data.train),
        "held_out_sequences": len(data.validation) if data.validation is not None else 0,
        "log_history": trainer.state.log_history,
        "host_peak_bytes": peak_resident_bytes(),
    }


def _schedule(
    settings: TrainSettings, data: TrainingData, start_step: int, total_steps: int
) -> dict[str, Any]:
    """Return what a full run adds to a trial's arguments."""
    values: dict[str, Any] = {
        "max_steps": total_steps,
        "logging_steps": settings.logging_steps,
        "logging_first_step": True,
        # `save_total_limit` is RunLog's: Trainer deletes the old checkpoint before the other ranks
        # have written their parts of the new one.
        "save_strategy": "steps" if settings.save_steps else "no",
        "report_to": ["tensorboard"] if settings.use_tensorboard else [],
    }
    if settings.save_steps:
        values["save_steps"] = settings.save_steps
    if settings.warmup_ratio is not None:
        values["warmup_steps"] = round(settings.warmup_ratio * total_steps)
    if data.validation is not None:
        values["eval_on_start"] = start_step == 0
        if settings.eval_steps:
            values |= {"eval_strategy": "steps", "eval_steps": settings.eval_steps}
    return values


def _resumed_step(checkpoint: str | None, identity: dict[str, Any]) -> int:
    if checkpoint is None:
        return 0
    check_identity(Path(checkpoint), identity)
    return step_of(Path(checkpoint))


def _save_final_weights(trainer: AutotuneTrainer, request: Request, data: TrainingData) -> None:
    """Write the whole model (or the adapter) as safetensors into the run's folder."""
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not trainer.is_world_process_zero():
        return
    if request.workload.precision is Precision.BF16:
        state = {name: value.to(torch.bfloat16) for name, value in state.items()}
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    model.save_pretrained(request.out_dir, state_dict=state)
    if data.tokenizer is not None:
        data.tokenizer.save_pretrained(request.out_dir)


class RunLog(TrainerCallback):
    """Writes what the Trainer logs as JSON lines, and keeps the heartbeat going."""

    def __init__(
        self,
        request: Request,
        answer: Answer,
        trainer: AutotuneTrainer,
        steps_per_epoch: float,
        identity: dict[str, Any],
        save_total_limit: int | None = None,
    ) -> None:
        self._file = Path(request.out_dir) / LOG_FILE
        self._answer = answer
        self._trainer = trainer
        self._steps_per_epoch = steps_per_epoch
        self._identity = identity
        self._save_total_limit = save_total_limit
        self._step_start = time.perf_counter()
        self._tokens = 0
        self._seconds = 0.0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Tell first what the run reads; of a run that goes on, behind the steps it keeps."""
        if self._answer.rank == 0 and state.global_step:
            cut_log(self._file, state.global_step)
            set_aside_later(self._file.parent, state.global_step)
        counts = self._answer.result.data
        if counts is not None:
            self._append({"step": state.global_step, "data": counts.model_dump()})

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock of a step."""
        self._answer.first_step()
        self._step_start = time.perf_counter()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Count tokens; correct the epoch, which a resumed Trainer counts from 0 again."""
        self._answer.heartbeat()
        self._seconds += time.perf_counter() - self._step_start
        self._tokens += self._trainer.step_tokens
        state.epoch = state.global_step / self._steps_per_epoch

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        """Tell of progress: a step may hold many micro-steps."""
        self._answer.heartbeat()

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        """Evaluation is progress, too."""
        self._answer.heartbeat()

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Declare the checkpoint whole once every rank has written its part; then drop old ones."""
        self._trainer.accelerator.wait_for_everyone()
        self._answer.heartbeat()
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self._answer.rank == 0 and folder.is_dir():
            write_identity(folder, self._identity)
            rotate_checkpoints(args.output_dir, self._save_total_limit)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append one line: the log's values, the step, tokens/s since the last training line."""
        if logs is None:
            return
        line: dict[str, Any] = {"step": state.global_step, **logs}
        if "loss" in logs and self._seconds > 0:
            line["tokens_per_s"] = self._tokens / self._seconds
            self._tokens, self._seconds = 0, 0.0
        self._append(line)

    def _append(self, line: dict[str, Any]) -> None:
        if self._answer.rank == 0:
            with self._file.open("a") as file:
                file.write(json.dumps(line) + "\n")
