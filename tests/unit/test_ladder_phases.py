"""What the ladder does depends on what the run was at when memory ran out."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from autotune.errors import AutotuneError
from autotune.ladder import at_recorded_rung, ladder_below, train_down
from autotune.plan import Recompute
from autotune.spec.hardware import detect_hardware
from autotune.training import Trained, train
from autotune.trial.launch import Ended
from autotune.trial.protocol import Outcome, Phase
from tests.integration.ranks import make_plan
from tests.unit.test_ladder import H100, MODEL, TINY, WORKLOAD, checkpoint, request_of

SHARDED = make_plan("fsdp2", 8, micro_batch_size=4, grad_accum_steps=4)
STAGE2 = make_plan("zero2", 8, micro_batch_size=4, grad_accum_steps=4)


class Runs:
    """A `run` that meets out-of-memory in one phase after another, and then ends well."""

    def __init__(self, *phases: Phase) -> None:
        self.phases = list(phases)
        self.tried: list[tuple[int, Recompute, bool, int | None]] = []

    def __call__(self, request, log, starter):
        plan = request.plan_object()
        self.tried.append(
            (plan.micro_batch_size, plan.recompute, plan.offload_params,
             request.train.eval_batch_size)
        )  # fmt: skip
        if not self.phases:
            return Trained(message="", document={"outcome": "ok"})
        document = {"outcome": "oom", "stopped_in": str(self.phases.pop(0))}
        return Trained(message="stopped.", advice="advice", document=document)


def down(folder: Path, plan, *phases: Phase, **settings):
    """Train through these ends; return what was tried, how it ended and what was said."""
    runs, out = Runs(*phases), io.StringIO()
    ladder = ladder_below(plan, MODEL, WORKLOAD, H100)
    ended = train_down(request_of(folder, plan, **settings), ladder, out, run=runs)
    return runs.tried, ended, out.getvalue()


def test_loading_goes_on_only_where_another_part_is_on_the_device(tmp_path):
    tried, ended, said = down(tmp_path, SHARDED, Phase.LOAD)
    none = Recompute.NONE
    assert tried == [(4, none, False, None), (4, none, True, None)] and ended.message == ""
    assert "Out of memory while it loaded. Next: offload of all states frees" in said


def test_a_step_that_runs_out_under_offload_keeps_it(tmp_path):
    tried, _, _ = down(tmp_path, SHARDED, Phase.LOAD, Phase.STEP, Phase.STEP, Phase.STEP)
    assert [(size, recompute, offload) for size, recompute, offload, _ in tried] == [
        (4, Recompute.NONE, False), (4, Recompute.NONE, True), (2, Recompute.NONE, True),
        (1, Recompute.NONE, True), (1, Recompute.FULL, True),
    ]  # fmt: skip


@pytest.mark.parametrize("plan", [STAGE2, make_plan("ddp", 8, micro_batch_size=4)])
def test_loading_stops_where_no_rung_loads_less(tmp_path, plan):
    tried, ended, _ = down(tmp_path, plan, *[Phase.LOAD] * 9)
    assert len(tried) == 1
    assert ended.advice.startswith("No rung further down loads less.")
    assert "would free" in ended.advice or "Use more GPUs" in ended.advice


def test_saving_stops_at_once(tmp_path):
    tried, ended, _ = down(tmp_path, SHARDED, *[Phase.SAVE] * 9)
    assert len(tried) == 1 and ended.advice == "advice"


@pytest.mark.parametrize(("given", "sizes"), [(None, [None, 2, 1]), (6, [6, 3, 1])])
def test_evaluation_lowers_its_own_batch_alone(tmp_path, given, sizes):
    tried, ended, said = down(
        tmp_path, STAGE2, *[Phase.EVALUATE] * 9, **({"eval_batch_size": given} if given else {})
    )
    assert tried == [(4, Recompute.NONE, False, size) for size in sizes]
    assert ended.advice == "advice"
    first = given or STAGE2.micro_batch_size
    assert f"Out of memory in evaluation. Next: eval_batch_size {first // 2} instead" in said
    assert ended.document["ladder"][-1]["eval_batch_size"] == 1


def test_going_on_after_an_interrupt_is_at_the_rung_reached(tmp_path):
    """Ctrl-C in the second launch; the file's own micro batch is known to run out."""
    last = checkpoint(tmp_path, 7)
    runs = Runs(Phase.STEP)

    def interrupted(request, log, starter):
        if runs.tried:
            raise KeyboardInterrupt
        return runs(request, log, starter)

    ladder = ladder_below(STAGE2, MODEL, WORKLOAD, H100)
    with pytest.raises(KeyboardInterrupt):
        train_down(request_of(tmp_path, STAGE2), ladder, io.StringIO(), run=interrupted)

    asked = request_of(tmp_path, STAGE2, resume_from=str(last))
    request, descent = at_recorded_rung(asked)
    assert request.plan_object().micro_batch_size == 2 and descent is not None
    assert descent.words().endswith("micro batch 2 instead of 4")
    again = Runs(Phase.STEP)
    plan = request.plan_object()
    ended = train_down(
        request, ladder_below(plan, MODEL, WORKLOAD, H100), io.StringIO(),
        descent=descent, run=again,
    )  # fmt: skip
    assert [each[0] for each in again.tried] == [2, 1]
    changes = ["micro batch 2 instead of 4", "micro batch 1 instead of 2"]
    assert [step["change"] for step in ended.document["ladder"]] == changes
    assert at_recorded_rung(asked)[0].plan_object().micro_batch_size == 1


def test_a_run_that_goes_on_in_another_folder_keeps_the_rung_there(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    down(first, STAGE2, Phase.STEP)
    asked = request_of(second, STAGE2, resume_from=str(checkpoint(first, 7)))
    request, descent = at_recorded_rung(asked)
    train_down(request, None, io.StringIO(), descent=descent, run=Runs())
    again = request_of(second, STAGE2, resume_from=str(checkpoint(second, 9)))
    assert at_recorded_rung(again)[0].plan_object().micro_batch_size == 2


def test_what_was_reached_for_another_plan_does_not_count(tmp_path):
    last = checkpoint(tmp_path, 7)
    down(tmp_path, STAGE2, Phase.STEP)
    edited = make_plan("zero2", 8, micro_batch_size=8, grad_accum_steps=2)
    asked = request_of(tmp_path, edited, resume_from=str(last))
    assert at_recorded_rung(asked) == (asked, None)
    anew = request_of(tmp_path, STAGE2)
    assert at_recorded_rung(anew) == (anew, None)
    asked = request_of(tmp_path, STAGE2, resume_from=str(last))
    for ladder in (ladder_below(STAGE2, MODEL, WORKLOAD, H100), None):
        down(tmp_path, STAGE2, Phase.STEP)
        assert at_recorded_rung(asked)[1] is not None
        # Begun anew: nothing was reached.
        train_down(request_of(tmp_path, STAGE2), ladder, io.StringIO(), run=Runs())
        assert at_recorded_rung(asked) == (asked, None)


def test_the_batch_of_evaluation_is_kept_too(tmp_path):
    last = checkpoint(tmp_path, 7)
    down(tmp_path, STAGE2, Phase.EVALUATE, eval_batch_size=8)
    request, _ = at_recorded_rung(
        request_of(tmp_path, STAGE2, resume_from=str(last), eval_batch_size=8)
    )
    assert request.train.eval_batch_size == 4 and request.plan_object() == STAGE2


@pytest.mark.parametrize("text", ["", "[]", '{"own": 1, "steps": []}', '{"steps": [{"plan": {}}]}'])
def test_a_record_that_cannot_be_read_is_said(tmp_path, text):
    last = checkpoint(tmp_path, 7)
    (tmp_path / "ladder.json").write_text(text)
    with pytest.raises(AutotuneError, match=r"ladder\.json cannot be read .* remove it"):
        at_recorded_rung(request_of(tmp_path, STAGE2, resume_from=str(last)))


@pytest.mark.parametrize(
    ("of", "key", "value"),
    [
        ("plan", "micro_batch_size", "two"),
        ("plan", "micro_batch_size", 0),
        ("plan", "micro_batch_size", 3),
        ("plan", "grad_accum_steps", 7),
        ("plan", "zero_stage", 3),
        ("plan", "dp_shard", 4),
        ("step", "eval_batch_size", "x"),
        ("step", "eval_batch_size", 0),
    ],
)
def test_a_rung_that_no_descent_comes_to_is_refused_before_a_launch(tmp_path, of, key, value):
    last = checkpoint(tmp_path, 7)
    down(tmp_path, STAGE2, Phase.STEP)
    record = tmp_path / "ladder.json"
    document = json.loads(record.read_text())
    step = document["steps"][-1]
    (step if of == "step" else step["plan"])[key] = value
    record.write_text(json.dumps(document))
    asked = request_of(tmp_path, STAGE2, resume_from=str(last), eval_batch_size=2)
    with pytest.raises(AutotuneError, match=r"ladder\.json cannot be read .* remove it"):
        at_recorded_rung(asked)


def advice_of(monkeypatch, folder: Path, phase: Phase, **settings) -> Trained:
    """What `train` says of a launch that ran out in a phase."""

    def run_launch(request, folder, limits, **_):
        return Ended(
            outcome=Outcome.OOM, message="no memory", rank=0, phase=phase, exit_codes=[1],
            elapsed_s=1.0,
        )  # fmt: skip

    monkeypatch.setattr("autotune.training.run_launch", run_launch)
    plan = make_plan("ddp", 2, micro_batch_size=4)
    request = request_of(folder, plan, **settings).model_copy(update={"device": "cpu"})

    class Quiet:
        def show_new(self, *, now=False):
            pass

    return train(request, Quiet())  # type: ignore[arg-type]


def test_the_message_says_the_phase_and_what_helps_in_it(monkeypatch, tmp_path):
    def said(phase, **settings):
        ended = advice_of(monkeypatch, tmp_path, phase, **settings)
        assert ended.document["stopped_in"] == str(phase)
        return f"{ended.message} {ended.advice}"

    assert said(Phase.STEP).startswith("The run stopped (oom) in a training step: no memory. Lower")
    assert "while it loaded: no memory. A smaller micro batch loads the same" in said(Phase.LOAD)
    assert "in evaluation: no memory. Lower eval_batch_size, 4 here" in said(Phase.EVALUATE)
    assert "eval_batch_size is 1 already" in said(Phase.EVALUATE, eval_batch_size=1)
    assert "there is no checkpoint to go on from" in said(Phase.SAVE)
    last = checkpoint(tmp_path, 7)
    assert f"the last checkpoint, {last}." in said(Phase.SAVE)
    assert json.loads((tmp_path / "run.json").read_text())["stopped_in"] == "save"


def test_the_words_of_a_small_model_on_cpu_ranks(tmp_path):
    """Where nothing is traced or offloaded, loading stops with advice all the same."""
    plan = make_plan("ddp", 2, micro_batch_size=2, grad_accum_steps=1)
    workload = WORKLOAD.model_copy(update={"seq_len": 64, "global_batch_size": 4})
    ladder = ladder_below(plan, TINY, workload, detect_hardware(2, "cpu"))
    assert ladder.next(plan, Phase.LOAD) is None
    assert "No rung further down loads less." in ladder.beyond(plan, Phase.LOAD)
