"""A trial on this rank: build, check, climb the ladder."""

from __future__ import annotations

import re
import sys

from autotune.runner.answer import Answer
from autotune.runner.data.build import vocab_size_of
from autotune.runner.data.packing import Sequences
from autotune.runner.data.synthetic import filled_sequences
from autotune.runner.engines import training_arguments
from autotune.runner.gauges import MEMORY_ERRORS, memory_outcome
from autotune.runner.ladder import Ladder, LadderLoader
from autotune.runner.orders import make_orders
from autotune.runner.rehearsal import one_step, rehearse
from autotune.runner.session import Session, make_trainer, open_session
from autotune.runner.timers import StepTimer
from autotune.runner.trainer import AutotuneTrainer
from autotune.spec.training import TrainSettings
from autotune.trial.protocol import Outcome, Phase, Request, RungResult

_ENDLESS = 10**6
"""Optimizer steps the Trainer is told of; the ladder ends it long before."""
_AFTER_STEPS = {
    Phase.STEP: "after the steps",
    Phase.EVALUATE: "in evaluation, after the steps",
    Phase.SAVE: "in the checkpoint, after the steps",
}
_SETTINGS = TrainSettings(learning_rate=1e-4, lr_scheduler="constant")


def run_trial(request: Request, answer: Answer) -> None:
    """Measure every rung of the request, writing each as it finishes.

    A rung that runs out of memory ends the ladder: larger micro batches need more.
    """
    session = open_session(request, answer)
    ladder = make_ladder(session, StepTimer(session.gauge))
    if not ladder.next_rung():
        return
    climbed = False
    try:
        trainer = ladder_trainer(session, ladder)
        trainer.train()
        climbed = True
        if request.rehearses:
            answer.result.rehearsal = rehearse(session, trainer)
    except MEMORY_ERRORS as error:
        outcome = memory_outcome(error, session.gauge)
        if outcome is None:
            raise
        session.gauge.lift_limit()
        if climbed:
            said = _what_was_asked(error)
            raise MemoryError(f"{_AFTER_STEPS[answer.result.phase]}: {said}") from error
        answer.add_rung(_out_of_memory(ladder, outcome, error))
        raise MemoryError(_what_was_asked(error)) from error
    finally:
        session.gauge.lift_limit()  # to say what went wrong takes memory, too


def make_ladder(session: Session, timer: StepTimer) -> Ladder:
    """Return the ladder of the session's request; `ladder_trainer` climbs it."""
    request, answer = session.request, session.answer
    measurement = request.measurement
    if request.rehearses:
        measurement = measurement.model_copy(update={"max_direct_accumulation": sys.maxsize})
    return Ladder(
        make_orders(request, answer.folder, progress=answer.heartbeat),
        measurement,
        timer=timer,
        gauge=session.gauge,
        report=answer.add_rung,
        progress=answer.heartbeat,
        first_step=answer.first_step,
    )


def ladder_trainer(session: Session, ladder: Ladder) -> AutotuneTrainer:
    """Return a trainer whose `train()` measures every rung of the ladder."""
    request = session.request
    filled: Sequences | None = None
    if request.rehearses:
        filled = filled_sequences(request.workload, vocab_size_of(request), request.seed)
    trainer = make_trainer(
        session,
        lambda: training_arguments(
            session.request,
            session.plan,
            _SETTINGS,
            max_steps=_ENDLESS,
            save_strategy="no",
            logging_strategy="no",
        ),
        loader=LadderLoader(
            session.train_loader(sequences=filled),
            ladder.start_segment,
            sequence_tokens=session.data.train.mean_trained_tokens(),
        ),
        timer=ladder.timer,
        eval_loader=None if filled is None else one_step(session, filled),
    )
    trainer.add_callback(ladder)
    ladder.trainer = trainer
    return trainer


def _out_of_memory(ladder: Ladder, outcome: Outcome, error: BaseException) -> RungResult:
    segment = ladder.current
    return RungResult(
        micro_batch_size=segment.micro_batch_size,
        outcome=outcome,
        message=f"at accumulation {segment.grad_accum_steps}: {_what_was_asked(error)}",
        accumulations=ladder.finished_of_current_rung,
    )


def _what_was_asked(error: BaseException) -> str:
    """Return the size the allocator could not give, where its message says it, else its message."""
    text = str(error)
    asked = re.search(r"[Tt]ried to allocate ([\d.]+ ?\w+)", text)
    first_line = next(iter(text.splitlines()), type(error).__name__)
    return f"no memory for {asked[1]} more" if asked else first_line
