"""What a confirmation does after its steps, as a full run would: evaluate and save, once."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from autotune.runner.data.loader import EvalLoader
from autotune.runner.data.packing import Sequences
from autotune.runner.session import Session
from autotune.runner.trainer import AutotuneTrainer
from autotune.trial.protocol import Rehearsal


def one_step(session: Session, sequences: Sequences) -> EvalLoader:
    """Return a loader of a single evaluation step: a micro batch on each data-parallel rank."""
    plan = session.plan
    wanted = plan.micro_batch_size * plan.data_parallel_size
    rows = np.arange(wanted, dtype=np.int64) % len(sequences)
    return EvalLoader(sequences.take(rows), micro_batch_size=plan.micro_batch_size, **session.place)


def rehearse(session: Session, trainer: AutotuneTrainer) -> Rehearsal:
    """Evaluate one step and write one checkpoint, which is removed; return what both took.

    The checkpoint is the Trainer's own, by the method it calls itself at `save_steps`.
    """
    gauge = session.gauge
    gauge.reset()
    before = gauge.now_s()
    trainer.evaluate()
    evaluated = gauge.now_s()
    session.answer.heartbeat()
    trainer._save_checkpoint(trainer.model, trial=None)
    trainer.accelerator.wait_for_everyone()
    saved = gauge.now_s()
    session.answer.heartbeat()
    peak = gauge.read()
    folder = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"
    num_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    trainer.accelerator.wait_for_everyone()
    if trainer.is_local_process_zero():
        shutil.rmtree(folder)
    return Rehearsal(
        evaluation_s=evaluated - before,
        save_s=saved - evaluated,
        checkpoint_bytes=num_bytes,
        peak_allocated_bytes=peak.allocated_bytes,
        peak_reserved_bytes=peak.reserved_bytes,
    )
