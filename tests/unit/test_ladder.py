"""After out-of-memory: which rung comes next, what is said of it, from where it goes on."""

from __future__ import annotations

import io
import json
import os

import pytest

from autotune.config import LadderRung
from autotune.ladder import ladder_below, lowered, train_down
from autotune.plan import Recompute
from autotune.spec.hardware import detect_hardware, load_hardware
from autotune.spec.model import load_model
from autotune.spec.training import TrainSettings
from autotune.spec.workload import Lora, Workload
from autotune.training import Trained
from autotune.trial.checkpoint import write_identity
from autotune.trial.protocol import ModelSource, Request
from tests.integration.ranks import make_plan

MODEL = load_model("qwen3-8b")
TINY = load_model("tiny-qwen3")
H100 = load_hardware("h100-sxm", 8)
WORKLOAD = Workload(seq_len=2048, global_batch_size=128, packing=False)


def sizes(ladder):
    return [
        (plan.micro_batch_size, plan.grad_accum_steps, plan.recompute, plan.offload_params)
        for plan in ladder.rungs
    ]


def test_smaller_micro_batches_then_recompute_then_offload_at_one_global_batch():
    plan = make_plan("fsdp2", 8, micro_batch_size=4, grad_accum_steps=4)
    ladder = ladder_below(plan, MODEL, WORKLOAD, H100)
    none, full = Recompute.NONE, Recompute.FULL
    assert sizes(ladder) == [
        (2, 8, none, False), (1, 16, none, False), (1, 16, full, False), (1, 16, full, True),
    ]  # fmt: skip
    assert {rung.global_batch_size for rung in ladder.rungs} == {128}
    assert {(rung.engine, rung.dp_shard, rung.cp) for rung in ladder.rungs} == {(plan.engine, 8, 1)}
    assert ladder.rungs[-1].strategy == "fsdp2_offload"


def test_offload_only_where_checkpoints_and_device_allow():
    cpu = detect_hardware(2, "cpu")
    for strategy, hardware in (("zero2", H100), ("zero3", H100), ("ddp", H100), ("fsdp2", cpu)):
        plan = make_plan(strategy, hardware.num_gpus, micro_batch_size=2, grad_accum_steps=1)
        workload = WORKLOAD.model_copy(update={"global_batch_size": plan.global_batch_size})
        ladder = ladder_below(plan, MODEL, workload, hardware)
        assert len(ladder.rungs) == 2 and not any(rung.offload_params for rung in ladder.rungs)


def test_a_rung_that_a_rule_refuses_is_left_out():
    plan = make_plan("fsdp2", 8, micro_batch_size=2, grad_accum_steps=8)
    lora = Lora(dropout=0.1, target_modules=("q_proj",))
    workload = WORKLOAD.model_copy(update={"adapter": lora})
    assert all(
        rung.recompute is Recompute.NONE for rung in ladder_below(plan, MODEL, workload, H100).rungs
    )  # AT119


def test_the_file_s_own_rungs_as_far_as_they_fit():
    plan = make_plan("zero2", 8, micro_batch_size=4, grad_accum_steps=4)

    def rung(micro, accum, recompute=False):
        return LadderRung(
            micro_batch_size=micro,
            gradient_accumulation_steps=accum,
            gradient_checkpointing=recompute,
        )

    given = [rung(4, 4, True), rung(8, 2), rung(2, 4), rung(1, 16, True)]
    ladder = ladder_below(plan, MODEL, WORKLOAD, H100, given)
    assert [(p.micro_batch_size, p.grad_accum_steps) for p in ladder.rungs] == [(4, 4), (1, 16)]


def test_figures_of_the_estimator_and_what_comes_after_the_last():
    plan = make_plan("zero2", 8, micro_batch_size=4, grad_accum_steps=4)
    ladder = ladder_below(plan, MODEL, WORKLOAD, H100)
    step = ladder.next(plan)
    assert step.freed_bytes > 2**30
    gib = step.freed_bytes / 2**30
    assert step.words() == f"micro batch 2 instead of 4 frees {gib:.2f} GiB (predicted)"
    words = []
    while step is not None:
        plan, step = step.plan, ladder.next(step.plan)
        words += [step.change] if step else []
    assert words == ["micro batch 1 instead of 2", "recomputation of activations"]
    beyond = ladder.beyond(plan)
    assert "ZeRO-3 would free" in beyond and "a checkpoint of ZeRO-2 cannot be read by" in beyond


def test_a_rung_that_frees_nothing_is_skipped():
    """Accumulation keeps gradients between micro-steps, which can weigh more than it saves."""
    plan = make_plan("zero2", 2, micro_batch_size=2, grad_accum_steps=1)
    workload = Workload(seq_len=64, global_batch_size=4, packing=False)
    ladder = ladder_below(plan, TINY, workload, detect_hardware(2, "cpu"))
    freed = {rung.id: ladder._freed_bytes(plan, rung) for rung in ladder.rungs}
    step = ladder.next(plan)
    for rung_id, bytes_freed in freed.items():
        if step is not None and rung_id == step.plan.id:
            break
        assert bytes_freed <= 0
    assert step is None or step.freed_bytes > 0


def request_of(folder, plan, **settings):
    return Request(
        launch_id="x", mode="train", model=ModelSource(name="m", config=TINY.hf_config),
        plan=plan.to_dict(), workload=WORKLOAD, device="cuda", out_dir=str(folder),
        train=TrainSettings(**settings),
    )  # fmt: skip


def checkpoint(folder, step):
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    write_identity(path, {})
    return path


def test_from_the_last_whole_checkpoint_or_from_the_start(tmp_path):
    plan = make_plan("fsdp2", 8, micro_batch_size=2, grad_accum_steps=8)
    request = request_of(tmp_path, plan, eval_batch_size=4)
    (tmp_path / "log.jsonl").write_text('{"step": 0, "data": {}}\n{"step": 1, "loss": 5.0}\n')
    fresh = lowered(request, plan)
    assert fresh.train.resume_from is None and fresh.train.eval_batch_size == 2
    assert (tmp_path / "log.jsonl").read_text() == ""
    assert '"loss": 5.0' in (tmp_path / "log.cut.jsonl").read_text()
    earlier = request_of(tmp_path, plan, resume_from="/elsewhere/checkpoint-3")
    assert lowered(earlier, plan).train.resume_from == "/elsewhere/checkpoint-3"
    last = checkpoint(tmp_path, 7)
    assert lowered(earlier, plan).train.resume_from == str(last)


@pytest.mark.parametrize("written_again", [False, True])
def test_out_of_memory_before_the_first_step_of_a_run_taken_up_earlier(tmp_path, written_again):
    """The user goes on from step 3; the checkpoint of step 7 is what is to be trained anew."""
    plan = make_plan("fsdp2", 8, micro_batch_size=2, grad_accum_steps=8)
    chosen, later = checkpoint(tmp_path, 3), checkpoint(tmp_path, 7)
    os.utime(later / "autotune_checkpoint.json", (1, 1))
    tried = []

    def run(request, log, starter):
        tried.append(request.train.resume_from)
        if written_again:
            write_identity(later, {})
        return Trained(message="", document={"outcome": "oom" if len(tried) == 1 else "ok"})

    request = request_of(tmp_path, plan, resume_from=str(chosen))
    train_down(request, ladder_below(plan, MODEL, WORKLOAD, H100), io.StringIO(), run=run)
    assert tried == [str(chosen), str(later if written_again else chosen)]


@pytest.mark.parametrize("outcome", ["ok", "hang", "crashed"])
def test_only_out_of_memory_goes_down(tmp_path, outcome):
    plan = make_plan("fsdp2", 8, micro_batch_size=2, grad_accum_steps=8)
    said = []

    def run(request, log, starter):
        said.append(request.plan_object().micro_batch_size)
        return Trained(message="" if outcome == "ok" else "why", document={"outcome": outcome})

    ladder = ladder_below(plan, MODEL, WORKLOAD, H100)
    ended = train_down(request_of(tmp_path, plan), ladder, io.StringIO(), run=run)
    assert said == [2] and ended.document["ladder"] == []


def test_down_to_the_rung_that_fits_and_no_further(tmp_path):
    plan = make_plan("fsdp2", 8, micro_batch_size=4, grad_accum_steps=4)
    tried = []

    def run(request, log, starter):
        tried.append((request.plan_object().micro_batch_size, request.train.resume_from))
        if len(tried) == 1:
            checkpoint(tmp_path, 5)
        fits = tried[-1][0] <= fitting
        return Trained(
            message="" if fits else "The run stopped (oom): x.",
            advice="" if fits else "Lower micro_batch_size and",
            document={"outcome": "ok" if fits else "oom"},
        )

    fitting, out = 1, io.StringIO()
    ended = train_down(
        request_of(tmp_path, plan), ladder_below(plan, MODEL, WORKLOAD, H100), out, run=run
    )
    last = str(tmp_path / "checkpoint-5")
    assert tried == [(4, None), (2, last), (1, last)] and ended.message == ""
    assert [each["change"] for each in ended.document["ladder"]] == [
        "micro batch 2 instead of 4", "micro batch 1 instead of 2",
    ]  # fmt: skip
    assert "Out of memory. Next: micro batch 2 instead of 4 frees" in out.getvalue()
    assert "goes on from checkpoint-5" in out.getvalue()
    assert len(json.loads((tmp_path / "run.json").read_text())["ladder"]) == 2
    fitting, tried = 0, tried[:1]
    ladder = ladder_below(plan, MODEL, WORKLOAD, H100)
    ended = train_down(request_of(tmp_path, plan), ladder, io.StringIO(), run=run)
    assert len(tried) == 1 + 1 + 4  # every rung, and no more
    assert ended.message == "The run stopped (oom): x."
    assert ended.advice.startswith("Nothing further down keeps this run's checkpoints.")
    tried = tried[:1]
    ended = train_down(request_of(tmp_path, plan), None, io.StringIO(), run=run)
    assert len(tried) == 2 and ended.advice == "Lower micro_batch_size and"
