"""A run's folder and log, seen from outside the ranks."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import pytest

from autotune import training
from autotune.cli import train as cli_train
from autotune.errors import AutotuneError
from autotune.spec.workload import Workload
from autotune.training import TrainLog, check_output_folder, last_checkpoint, train
from autotune.trial.checkpoint import write_identity
from autotune.trial.protocol import Outcome, Phase
from autotune.trial.run_log import cut_log
from autotune.trial.verdict import Ended
from tests.integration.ranks import make_plan, training_request


def checkpoint(folder: Path, step: int, *, whole: bool = True) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    if whole:
        (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        write_identity(path, {})
    return path


def test_the_last_checkpoint_is_the_one_with_the_most_steps(tmp_path: Path):
    checkpoint(tmp_path, 9)
    ten = checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 11, whole=False)
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint(tmp_path) == ten


def test_no_checkpoint_says_what_to_do(tmp_path: Path):
    checkpoint(tmp_path, 5, whole=False)
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(AutotuneError, match=r"no checkpoint in .* --save-steps"):
            last_checkpoint(folder)


@pytest.mark.parametrize("held", ["log.jsonl", "run.json", "model.safetensors", "checkpoint-3"])
def test_a_folder_that_holds_a_run_is_refused(tmp_path: Path, held: str):
    if held == "checkpoint-3":
        checkpoint(tmp_path, 3)
    else:
        (tmp_path / held).write_text("x")
    with pytest.raises(AutotuneError, match=f"holds another run.*{held}.*--resume"):
        check_output_folder(tmp_path)


def test_a_new_folder_is_free(tmp_path: Path):
    (tmp_path / "launches").mkdir()  # left by a run that was refused before its first step
    check_output_folder(tmp_path)
    check_output_folder(tmp_path / "absent")


def test_the_log_shows_each_whole_line_once(tmp_path: Path):
    old = json.dumps({"step": 1, "loss": 9.0}) + "\n"
    file = tmp_path / "log.jsonl"
    file.write_text(old)
    shown = io.StringIO()
    log = TrainLog(tmp_path, shown)
    row = {"step": 2, "loss": 1.25, "grad_norm": 0.5, "learning_rate": 1e-3, "tokens_per_s": 1234.5}
    line = json.dumps(row) + "\n"
    file.write_text(old + line + line[:10])
    log.show_new(now=True)
    want = "step 2: loss 1.2500, gradient norm 0.500, lr 1.00e-03, 1,234 tokens/s\n"
    assert shown.getvalue() == want, "neither a resumed run's old lines nor half a line"
    file.write_text(old + line + json.dumps({"step": 3, "eval_loss": 2.0, "eval_tokens": 7}) + "\n")
    log.show_new(now=True)
    assert shown.getvalue() == want + "step 3: held-out loss 2.0000 over 7 tokens\n"


def test_only_the_run_that_is_gone_on_with_may_be_written_over(tmp_path: Path):
    mine, other = tmp_path / "mine", tmp_path / "other"
    for folder in (mine, other):
        checkpoint(folder, 5)
        (folder / "model.safetensors").write_text(folder.name)
    check_output_folder(mine, mine / "checkpoint-5")
    check_output_folder(tmp_path / "new", mine / "checkpoint-5")
    with pytest.raises(AutotuneError, match=r"other holds another run \(model\.safetensors"):
        check_output_folder(other, mine / "checkpoint-5")


def test_train_refuses_to_resume_into_another_run(tmp_path: Path):
    """Through the verb itself: --resume must not switch the check off."""
    config = tmp_path / "run.yml"
    config.write_text(
        "base_model: tiny-qwen3\nlearning_rate: 1e-4\ndatasets: [{path: a/b}]\n"
        f"output_dir: {tmp_path / 'other'}\n"
    )
    other = tmp_path / "other"
    other.mkdir()
    (other / "log.jsonl").write_text("{}\n")
    mine = checkpoint(tmp_path / "mine", 5)
    arguments = ["train", str(config), "--device", "cpu", "--resume", str(mine)]
    parser = argparse.ArgumentParser()
    cli_train.add_arguments(parser)
    with pytest.raises(AutotuneError, match=r"other holds another run \(log\.jsonl\)"):
        cli_train.run(parser.parse_args(arguments[1:]))
    assert [path.name for path in other.iterdir()] == ["log.jsonl"]


def rows(*steps: int, **values: float) -> str:
    return "".join(json.dumps({"step": step, "loss": 1.0} | values) + "\n" for step in steps)


def test_a_resumed_run_cuts_the_log_where_it_goes_on(tmp_path: Path):
    file = tmp_path / "log.jsonl"
    file.write_text(rows(1, 2, 3, 4) + '{"step": 5, "lo')
    shown = io.StringIO()
    log = TrainLog(tmp_path, shown, resumed_step=2)
    log.show_new(now=True)
    cut_log(file, 2)
    assert file.read_text() == rows(1, 2)
    assert (tmp_path / "log.cut.jsonl").read_text() == rows(3, 4) + '{"step": 5, "lo\n'
    with file.open("a") as more:
        more.write(rows(3, loss=7.0))
    log.show_new(now=True)
    assert shown.getvalue() == "step 3: loss 7.0000\n"
    cut_log(file, 3)
    assert file.read_text() == rows(1, 2) + rows(3, loss=7.0), "nothing after it: left as it is"
    cut_log(tmp_path / "absent.jsonl", 3)


def test_lines_cut_by_several_resumes_are_all_kept(tmp_path: Path):
    file = tmp_path / "log.jsonl"
    for loss in (1.0, 2.0):
        file.write_text(rows(1) + rows(2, loss=loss))
        cut_log(file, 1)
    assert (tmp_path / "log.cut.jsonl").read_text() == rows(2) + rows(2, loss=2.0)


@pytest.mark.parametrize(
    ("device", "outcome", "advised"),
    [
        ("cuda", Outcome.HOST_OOM, "offload less to it"),
        ("cuda", Outcome.OOM, "Lower micro_batch_size"),
        ("cpu", Outcome.HOST_OOM, "Lower micro_batch_size"),
    ],
)
def test_the_memory_that_ran_out_is_the_one_to_spare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, outcome: Outcome, advised: str
):
    ended = Ended(
        outcome=outcome, message="no memory", rank=0, phase=Phase.STEP, exit_codes=[1], elapsed_s=1
    )
    monkeypatch.setattr(training, "run_launch", lambda *_, **__: ended)
    request = training_request(
        make_plan("ddp", 1), tmp_path, data=tmp_path / "data.jsonl",
        workload=Workload(seq_len=64, global_batch_size=1),
    )  # fmt: skip
    request = request.model_copy(update={"device": device})
    advice = train(request, TrainLog(tmp_path, io.StringIO())).advice
    assert advice.startswith(("The host's memory", "Lower"))
    assert advised in advice
