"""Which checkpoint a run may go on from: a whole one, of the very same run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autotune.errors import AutotuneError
from autotune.plan import Engine, Plan
from autotune.spec.model import load_model
from autotune.spec.workload import Lora, Precision, Workload
from autotune.trial.checkpoint import (
    IDENTITY_FILE,
    check_identity,
    checkpoints_of,
    identity_of,
    is_whole,
    set_aside_later,
    step_of,
    write_identity,
)
from autotune.trial.protocol import ModelSource, Request

PLAN = Plan(strategy="zero2", engine=Engine.DEEPSPEED, zero_stage=2, dp_shard=2, micro_batch_size=2)


def request(model: str = "tiny-qwen3", *, seed: int = 42, plan: Plan = PLAN, **workload) -> Request:
    return Request(
        launch_id="run",
        mode="train",
        model=ModelSource(name=model, config=load_model(model).hf_config),
        plan=plan.to_dict(),
        workload=Workload(**workload),
        device="cpu",
        out_dir="out",
        seed=seed,
    )


def changed(**changes) -> Request:
    return request(plan=Plan.from_dict(PLAN.to_dict() | changes))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "trainer_state.json").write_text('{"global_step": 5}')
    write_identity(tmp_path, identity_of(request(), "abc"))
    return tmp_path


def test_the_same_run_goes_on(checkpoint):
    check_identity(checkpoint, identity_of(request(), "abc"))
    check_identity(checkpoint, identity_of(request(), None))
    assert step_of(checkpoint) == 5
    split = changed(micro_batch_size=1, grad_accum_steps=2)
    check_identity(checkpoint, identity_of(split, "abc"))  # the same sequences a step


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (changed(zero_stage=3), "zero_stage 2 there, 3 here"),
        (
            changed(engine="fsdp2", zero_stage=0),
            "engine deepspeed there, fsdp2 here; zero_stage 2 there, 0 here",
        ),
        (changed(dp_shard=1, micro_batch_size=4), "ranks 2 there, 1 here"),
        (changed(dp_shard=1, cp=2, micro_batch_size=4), "sequence_parallel 1 there, 2 here"),
        (request(optimizer="sgd"), "optimizer adamw there, sgd here"),
        (request(precision=Precision.FP32), "precision bf16 there, fp32 here"),
        (request(adapter=Lora(r=8)), "adapter None there"),
        (request("tiny-llama"), "architecture qwen3 there, llama here"),
        (changed(micro_batch_size=1), "global_batch_size 4 there, 2 here"),
        (request(seed=7), "seed 42 there, 7 here"),
    ],
)
@pytest.mark.parametrize("data", ["abc", None])
def test_any_other_run_is_refused_in_one_message(checkpoint, other, said, data):
    with pytest.raises(AutotuneError, match="is of another run") as caught:
        check_identity(checkpoint, identity_of(other, data))
    assert said in str(caught.value)


def test_other_data_is_refused_where_it_was_read(checkpoint):
    with pytest.raises(AutotuneError, match=r"data abc there, xyz here\); it would skip some"):
        check_identity(checkpoint, identity_of(request(), "xyz"))


@pytest.mark.parametrize("missing", [IDENTITY_FILE, "trainer_state.json"])
def test_what_was_cut_short_is_no_checkpoint(checkpoint, missing):
    assert is_whole(checkpoint)
    (checkpoint / missing).unlink()
    assert not is_whole(checkpoint)
    with pytest.raises(AutotuneError, match="is not a checkpoint of `autotune train`, or its writ"):
        check_identity(checkpoint, identity_of(request(), "abc"))


def test_checkpoints_of_steps_that_run_again_are_set_aside(tmp_path):
    def names() -> list[str]:
        return sorted(path.name for path in tmp_path.iterdir())

    for step in (4, 6, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    set_aside_later(tmp_path, 4)
    assert names() == ["checkpoint-4", "cut-checkpoint-10", "cut-checkpoint-6"]
    for step in (6, 8):
        (tmp_path / f"checkpoint-{step}").mkdir()
    set_aside_later(tmp_path, 4)
    assert names()[1:] == [
        "cut-checkpoint-10", "cut-checkpoint-6", "cut-checkpoint-6-2", "cut-checkpoint-8",
    ]  # fmt: skip
    assert [step for step, _ in checkpoints_of(tmp_path)] == [4]
    (tmp_path / "cut-checkpoint-6").rmdir()
    (tmp_path / "cut-checkpoint-6-2" / "shard").touch()
    (tmp_path / "checkpoint-6").mkdir()
    set_aside_later(tmp_path, 4)
    assert "cut-checkpoint-6" in names()
    assert checkpoints_of(tmp_path / "absent") == []


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"global_step": "a"}'])
def test_files_that_cannot_be_read_are_one_message(checkpoint, text):
    (checkpoint / "trainer_state.json").write_text(text)
    with pytest.raises(AutotuneError, match=r"trainer_state\.json"):
        step_of(checkpoint)
    (checkpoint / IDENTITY_FILE).write_text(text)
    with pytest.raises(AutotuneError):
        check_identity(checkpoint, identity_of(request(), "abc"))


def test_the_identity_is_plain_json(checkpoint):
    assert json.loads((checkpoint / IDENTITY_FILE).read_text()) == identity_of(request(), "abc")
