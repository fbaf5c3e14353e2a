"""What a full run leaves on a rank: in this process, without a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from autotune.runner.answer import Answer
from autotune.runner.train import RunLog
from autotune.runner.trainer import AutotuneTrainer
from autotune.trial.checkpoint import IDENTITY_FILE
from autotune.trial.protocol import Request

pytestmark = pytest.mark.integration


ARGUMENTS = cast(TrainingArguments, SimpleNamespace(output_dir=""))


def run_log(rank: int, folder: Path, wait: Callable[[], None] = lambda: None) -> RunLog:
    answer = SimpleNamespace(rank=rank, heartbeat=lambda: None, result=SimpleNamespace(data=None))
    trainer = SimpleNamespace(accelerator=SimpleNamespace(wait_for_everyone=wait))
    return RunLog(
        cast(Request, SimpleNamespace(out_dir=str(folder))),
        cast(Answer, answer),
        cast(AutotuneTrainer, trainer),
        1.0,
        {"seed": 1},
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_a_checkpoint_is_declared_whole_after_every_rank_wrote_its_part(
    rank: int, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint-5"
    folder.mkdir()
    seen: list[bool] = []
    log = run_log(rank, tmp_path, lambda: seen.append((folder / IDENTITY_FILE).exists()))
    arguments: Any = SimpleNamespace(output_dir=str(tmp_path))
    log.on_save(cast(TrainingArguments, arguments), TrainerState(global_step=5), TrainerControl())
    assert seen == [False], "it waited for the others before it wrote"
    assert (folder / IDENTITY_FILE).exists() == (rank == 0)


@pytest.mark.parametrize(("rank", "step"), [(0, 1), (1, 1), (0, 0)])
def test_one_rank_of_a_resumed_run_sets_aside_what_comes_again(
    rank: int, step: int, tmp_path: Path
) -> None:
    lines = ['{"step": 1, "loss": 2.0}\n', '{"step": 2, "loss": 1.0}\n']
    (tmp_path / "log.jsonl").write_text("".join(lines))
    (tmp_path / "checkpoint-2").mkdir()
    run_log(rank, tmp_path).on_train_begin(
        ARGUMENTS, TrainerState(global_step=step), TrainerControl()
    )
    acts = rank == 0 and step > 0
    assert (tmp_path / "log.jsonl").read_text() == (lines[0] if acts else "".join(lines))
    assert (tmp_path / "cut-checkpoint-2").is_dir() == acts
