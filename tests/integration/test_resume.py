"""A resumed run goes on exactly; its final weights are those the run evaluated.

10 steps with a checkpoint at 5, then the same run again from that checkpoint: the losses, gradient
norms and the last held-out loss of both are equal bit for bit, and so are the final weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from autotune.errors import AutotuneError
from autotune.spec.workload import Workload
from autotune.trial.checkpoint import IDENTITY_FILE, is_whole
from autotune.trial.launch import run_launch
from autotune.trial.protocol import Outcome, Request
from tests.integration.ranks import LIMITS, logged, make_plan, run_well, training_request
from tests.integration.reference import held_out_loss

pytestmark = pytest.mark.integration

BF16_LOSS = 5e-3
"""bf16 keeps 8 bits: a logit of 4 is rounded by up to 2**-7, either way and on average over a
hundred tokens far less. The training below moves the loss by a hundred times as much."""


@pytest.mark.parametrize(
    "strategy",
    [
        "fsdp2",
        pytest.param("zero3", marks=pytest.mark.slow),
        pytest.param("zero2", marks=pytest.mark.slow),
        pytest.param("ddp", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_goes_on_exactly(
    strategy: str, tmp_path: Path, corpus: Path, initial_state: Path
) -> None:
    plan = make_plan(strategy, 2, micro_batch_size=2, grad_accum_steps=2)
    settings = {
        "data": corpus,
        "workload": Workload(seq_len=64, global_batch_size=8),
        "weights": initial_state,
        "max_steps": 10,
        "save_steps": 5,
        "val_set_size": 7,
        "learning_rate": 3e-3,
        "lr_scheduler": "cosine",
        "save_final_weights": True,
    }
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    request = training_request(plan, whole, **settings)
    run_well(request)
    assert len(logged(whole, "loss")) == 10
    start, *_, end = logged(whole, "eval_loss")
    assert start == pytest.approx(held_out_loss(initial_state, request), abs=BF16_LOSS)
    assert end == pytest.approx(held_out_loss(whole, request), abs=BF16_LOSS)
    assert start - end > 50 * BF16_LOSS, "untrained weights would pass for the final ones"

    checkpoint = whole / "checkpoint-5"
    run_well(training_request(plan, resumed, **settings, resume_from=str(checkpoint)))
    for key in ("loss", "grad_norm", "learning_rate"):
        assert logged(resumed, key) == logged(whole, key)[5:], key
    assert logged(resumed, "eval_loss") == [end]
    weights = [(folder / "model.safetensors").read_bytes() for folder in (whole, resumed)]
    assert weights[0] == weights[1]
    rows = [json.loads(line) for line in (resumed / "log.jsonl").read_text().splitlines()]
    assert min(row["step"] for row in rows if "data" not in row) == 6


def train(request: Request, launch: Path) -> None:
    ended = run_launch(request, launch, LIMITS)
    assert ended.outcome is Outcome.OK, ended.message


@pytest.mark.slow
def test_a_run_resumed_in_its_own_folder_holds_each_step_once(tmp_path: Path, corpus: Path) -> None:
    """As after a bad turn: back to checkpoint 2, with what came after it kept to one side."""
    plan, folder = make_plan("ddp", 1, micro_batch_size=2), tmp_path / "run"
    settings = {
        "data": corpus,
        "workload": Workload(seq_len=64, global_batch_size=2),
        "max_steps": 4,
        "save_steps": 2,
    }
    train(training_request(plan, folder, **settings), tmp_path / "first")
    old = logged(folder, "loss")
    again = training_request(plan, folder, **settings, resume_from=str(folder / "checkpoint-2"))
    train(again, tmp_path / "second")
    assert logged(folder, "loss") == old
    cut = [json.loads(line) for line in (folder / "log.cut.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in cut if "loss" in row] == old[2:]
    found = {path.name: is_whole(path) for path in folder.glob("*checkpoint-*")}
    assert found == {"checkpoint-2": True, "checkpoint-4": True, "cut-checkpoint-4": True}

    changed = tmp_path / "changed.jsonl"
    changed.write_text(corpus.read_text().replace("alpha", "omega"))
    settings |= {"data": changed, "resume_from": str(folder / "checkpoint-2")}
    before = (folder / "log.jsonl").read_bytes()
    with pytest.raises(AutotuneError, match=r"of another run \(data .* there, .* here\)"):
        train(training_request(plan, folder, **settings), tmp_path / "third")
    assert (folder / "log.jsonl").read_bytes() == before


@pytest.mark.slow
def test_old_checkpoints_go_once_the_new_one_is_whole(tmp_path: Path, corpus: Path) -> None:
    settings = {
        "data": corpus,
        "workload": Workload(seq_len=64, global_batch_size=2),
        "max_steps": 6,
        "save_steps": 2,
        "save_total_limit": 1,
    }
    plan = make_plan("zero2", 2)
    train(training_request(plan, tmp_path / "run", **settings), tmp_path / "launch")
    found = {path.name: is_whole(path) for path in (tmp_path / "run").glob("checkpoint-*")}
    assert found == {"checkpoint-6": True}


def test_a_rank_that_dies_while_saving_costs_no_old_checkpoint(tmp_path: Path) -> None:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from autotune.runner.train import RunLog

    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
    plan = make_plan("ddp", 1, micro_batch_size=2)
    workload = Workload(seq_len=64, global_batch_size=2)
    request = training_request(plan, tmp_path, data=tmp_path, workload=workload)

    def save(wait: Callable[[], None]) -> None:
        accelerator = SimpleNamespace(wait_for_everyone=wait)
        answer = SimpleNamespace(rank=0, heartbeat=lambda: None)
        trainer = SimpleNamespace(accelerator=accelerator)
        log = RunLog(request, answer, trainer, 1.0, {"model": "x"}, 1)
        arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
        log.on_save(arguments, TrainerState(global_step=4), TrainerControl())

    def killed() -> None:
        raise ConnectionError("rank 1 is gone")

    with pytest.raises(ConnectionError):
        save(killed)
    assert (tmp_path / "checkpoint-2").is_dir()
    save(lambda: None)
    assert not (tmp_path / "checkpoint-2").exists()
    assert (tmp_path / "checkpoint-4" / IDENTITY_FILE).is_file()
