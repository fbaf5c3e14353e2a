"""What a full run leaves on a rank: in this process, without a model."""

from __future__ import annotations

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


@pytest.mark.parametrize("rank", [0, 1])
def test_a_checkpoint_is_declared_whole_after_every_rank_wrote_its_part(
    rank: int, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint-5"
    folder.mkdir()
    seen: list[bool] = []
    wait = SimpleNamespace(wait_for_everyone=lambda: seen.append((folder / IDENTITY_FILE).exists()))
    answer = SimpleNamespace(rank=rank, heartbeat=lambda: None)
    log = RunLog(
        cast(Request, SimpleNamespace(out_dir=str(tmp_path))),
        cast(Answer, answer),
        cast(AutotuneTrainer, SimpleNamespace(accelerator=wait)),
        1.0,
        {"seed": 1},
    )
    arguments: Any = SimpleNamespace(output_dir=str(tmp_path))
    log.on_save(cast(TrainingArguments, arguments), TrainerState(global_step=5), TrainerControl())
    assert seen == [False], "it waited for the others before it wrote"
    assert (folder / IDENTITY_FILE).exists() == (rank == 0)
