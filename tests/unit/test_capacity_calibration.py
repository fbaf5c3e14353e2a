"""`--calibrate`: factors of a study, on the cells of its model and GPU type alone."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from autotune.capacity import calibrate
from autotune.capacity.comparable import check_model
from autotune.errors import AutotuneError
from autotune.memory.estimate import framework_bytes
from autotune.plan import Engine, Plan
from autotune.planner import estimate_plan, rank_plans
from autotune.spec.hardware import load_hardware
from autotune.spec.model import load_model
from autotune.spec.strategy import load_strategies
from autotune.spec.workload import Lora, Workload
from autotune.trial.protocol import Outcome
from autotune.trial.record import TrialRecord
from tests.unit.capacity_runs import plan_of, run

DEMO = Path(__file__).resolve().parents[2] / "reports" / "examples" / "demo-2-cpu-ranks"
MODEL, WORKLOAD = load_model("qwen3-1.7b"), Workload()
HARDWARE = load_hardware("h100", 4)
ARGV = [
    "capacity", "--model", "qwen3-1.7b", "--gpu-type", "h100-sxm,a100-80gb", "--gpus", "2,4",
    "--tokens", "1B", "--strategies", "ddp,zero2,zero3,fsdp2",
]  # fmt: skip


def record(estimate, speed=1.0, memory=1.0, **changes):
    """A trial measured at `speed` and `memory` times what is predicted of its plan."""
    total = estimate.memory.total_bytes
    outside = framework_bytes(estimate.plan)
    values = {
        "launch": 1,
        "plan_id": estimate.plan.id,
        "outcome": Outcome.OK,
        "message": "",
        "plan": estimate.plan.to_dict(),
        "tokens_per_s": estimate.time.tokens_per_s * speed,
        "step_s": estimate.time.step_s / speed,
        "peak_reserved_bytes": round((total - outside) * memory),
        "predicted_bytes": total,
        "predicted_step_s": estimate.time.step_s,
        "predicted_tokens_per_s": estimate.time.tokens_per_s,
    }
    return TrialRecord(**values | changes)


def contract(**changes):
    own = {
        "schema_version": 1,
        "model": {"name": "Qwen/Qwen3-1.7B", "config": MODEL.hf_config},
        "hardware": {"device": "cuda", "gpu": "h100-sxm", "num_gpus": 4},
        "workload": WORKLOAD.model_dump(mode="json"),
    }
    return own | changes


@pytest.fixture(scope="module")
def estimates():
    """The best plan of each engine."""
    ranking = rank_plans(
        MODEL, WORKLOAD, HARDWARE, load_strategies(["ddp", "zero2", "zero3", "fsdp2"])
    )
    found = {}
    for estimate in ranking.candidates:
        found.setdefault(estimate.plan.engine, []).append(estimate)
    return found


@pytest.fixture
def write(tmp_path):
    def written(records, **changes):
        folder = tmp_path / "study"
        folder.mkdir()
        (folder / "study.json").write_text(json.dumps(contract(**changes)))
        lines = [json.dumps(each.to_dict()) + "\n" for each in records]
        (folder / "trials.jsonl").write_text("".join(lines))
        return str(folder)

    return written


def factors_of(records, **changes):
    return calibrate(
        "study",
        contract(**changes),
        records,
        model=MODEL,
        workload=WORKLOAD,
        gpu_types={"h100-sxm": "h100", "a100-80gb": "a100-80gb"},
        nvml_names={"h100-sxm": ["H100 80GB HBM3"], "a100-80gb": ["A100-SXM4-80GB"]},
    )


def test_factors_are_medians_by_engine(estimates):
    ddp, fsdp = estimates[Engine.DDP], estimates[Engine.FSDP2]
    records = [
        *(record(e, speed) for e, speed in zip(fsdp, (0.5, 0.8, 0.9), strict=False)),
        record(ddp[0], 0.4, memory=1.2),
        record(ddp[1], 0.1, outcome=Outcome.THRASH),  # did not run to a valid end
        record(ddp[1], 0.1, step_s=None),
        record(ddp[1], 0.1, plan={"engine": "of tomorrow"}),
    ]
    found = factors_of(records)
    assert found.factors(Engine.FSDP2).tokens_per_s == pytest.approx(0.8)
    assert found.factors(Engine.DDP).tokens_per_s == pytest.approx(0.4)
    assert found.factors(Engine.DDP).memory == pytest.approx(1.2, rel=1e-6)
    other = found.factors(Engine.DEEPSPEED)
    assert other.engine is None and other.num_trials == 4
    # In log: the middle of 0.5 and 0.8 is their geometric mean.
    assert other.tokens_per_s == pytest.approx(math.sqrt(0.5 * 0.8))


def test_applied_to_the_very_plan_it_gives_the_measurement(estimates):
    estimate = estimates[Engine.FSDP2][0]
    measured = record(estimate, 0.7, memory=1.3)
    corrected = factors_of([measured]).apply(estimate, HARDWARE)
    assert corrected.time.tokens_per_s == pytest.approx(measured.tokens_per_s)
    outside = framework_bytes(estimate.plan)
    assert corrected.memory.total_bytes - outside == pytest.approx(
        measured.peak_reserved_bytes, abs=16
    )
    assert corrected.memory.instants[corrected.memory.peak_instant] == pytest.approx(
        corrected.memory.total_bytes, abs=16
    )


def test_tokens_without_a_label_are_no_slowness(estimates):
    """Half of the positions are masked: labelled tokens/s is half, the step takes as predicted."""
    estimate = estimates[Engine.FSDP2][0]
    masked = record(estimate, tokens_per_s=estimate.time.tokens_per_s / 2)
    assert factors_of([masked]).overall.tokens_per_s == pytest.approx(1.0)


@pytest.mark.parametrize("missing", [False, True])
def test_what_the_study_predicted_is_not_asked(estimates, missing):
    """It was another version's, or that of a stand-in GPU; the cells use today's."""
    estimate = estimates[Engine.FSDP2][0]
    older = {
        "predicted_bytes": None if missing else 7 * estimate.memory.total_bytes,
        "predicted_step_s": None if missing else estimate.time.step_s / 5,
        "predicted_tokens_per_s": None if missing else estimate.time.tokens_per_s * 5,
    }
    found = factors_of([record(estimate, 0.8, memory=1.1, **older)]).overall
    assert found.tokens_per_s == pytest.approx(0.8)
    assert found.memory == pytest.approx(1.1, rel=1e-6)


def test_trials_are_predicted_with_the_study_s_own_workload(estimates):
    """At 512 tokens a step is shorter by itself: that is no factor for 2,048."""
    workload = WORKLOAD.model_copy(update={"seq_len": 512})
    plan = estimates[Engine.FSDP2][0].plan
    short = estimate_plan(MODEL, workload, plan, HARDWARE)
    own = {"workload": workload.model_dump(mode="json") | {"of_tomorrow": 1}}
    assert factors_of([record(short, 0.8)], **own).overall.tokens_per_s == pytest.approx(0.8)


def test_a_study_s_machine_is_one_node_whatever_its_size(estimates):
    """12 H100 in one machine: no cluster the catalogue knows, and measured all the same."""
    plan = replace(estimates[Engine.FSDP2][0].plan, dp_shard=12)
    machine = load_hardware("h100", 12, one_node=True)
    assert (machine.num_nodes, machine.gpus_per_node) == (1, 12)
    estimate = estimate_plan(MODEL, WORKLOAD, plan, machine)
    assert factors_of([record(estimate, 0.8)]).overall.tokens_per_s == pytest.approx(0.8)


@pytest.mark.parametrize("workload", [None, "text", {}, {"seq_len": "long"}])
def test_a_study_that_does_not_say_its_workload(estimates, workload):
    with pytest.raises(AutotuneError, match="does not say which workload"):
        factors_of([record(estimates[Engine.DDP][0])], workload=workload)


def test_memory_decides_anew_what_fits(estimates):
    estimate = estimates[Engine.FSDP2][0]
    assert str(estimate.verdict) == "fits"
    twice = factors_of([record(estimate, memory=3.0)]).apply(estimate, HARDWARE)
    assert str(twice.verdict) == "oom" and twice.fit_probability < 0.1


def test_only_its_own_gpu_is_calibrated(capsys, write, estimates):
    records = [record(each[0], 0.5) for each in estimates.values()]
    before = plan_of(capsys, *ARGV)
    after = plan_of(capsys, *ARGV, "--calibrate", write(records))
    for old, new in zip(before["cells"], after["cells"], strict=True):
        if new["gpu_type"] == "h100-sxm":
            assert new["basis"] == "calibrated" and new["calibration"]["num_trials"] >= 1
            assert new["tokens_per_s"] == pytest.approx(old["tokens_per_s"] / 2)
            assert new["predicted_tokens_per_s"] == pytest.approx(old["tokens_per_s"])
        else:
            assert new == old and new["basis"] == "predicted"
    assert any("is calibrated by" in note for note in after["notes"])
    assert any("Compare calibrated and predicted" in note for note in after["notes"])


def test_factors_can_change_which_engine_is_best(capsys, write, estimates):
    before = plan_of(capsys, *ARGV)["cells"][1]
    first = Engine(before["plan"]["engine"])
    records = [record(each[0], 0.2 if key is first else 1.0) for key, each in estimates.items()]
    after = plan_of(capsys, *ARGV, "--calibrate", write(records))["cells"][1]
    assert after["plan"]["engine"] != before["plan"]["engine"]
    plan = next(e for each in estimates.values() for e in each if e.plan.to_dict() == after["plan"])
    assert after["tokens_per_s"] == pytest.approx(
        estimate_plan(MODEL, WORKLOAD, plan.plan, HARDWARE).time.tokens_per_s
    )


def test_another_workload_is_said(capsys, write, estimates):
    workload = WORKLOAD.model_copy(update={"seq_len": 512}).model_dump(mode="json")
    folder = write([record(estimates[Engine.DDP][0])], workload=workload)
    notes = plan_of(capsys, *ARGV, "--calibrate", folder)["notes"]
    assert any("seq_len 512 there, 2048 here" in note for note in notes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"precision": "fp32"}, "precision fp32 there, bf16 here"),
        ({"packing": False}, "packing off there, on here"),
        ({"adapter": {"r": 8}}, "adapter r=8 dropout=0 on q_proj,.* there, none here"),
    ],
)
def test_a_study_of_other_kernels_is_refused(estimates, changes, words):
    """A factor of fp32, adapter or unpacked kernels says nothing about those asked about."""
    workload = WORKLOAD.model_dump(mode="json") | changes
    with pytest.raises(AutotuneError, match=f"{words}.* would correct no cell"):
        factors_of([record(estimates[Engine.DDP][0])], workload=workload)


def test_the_scale_of_an_adapter_changes_no_kernel(estimates):
    lora = WORKLOAD.model_copy(update={"adapter": Lora(r=8, alpha=16)})
    plan = estimates[Engine.FSDP2][0].plan
    study = contract(workload=lora.model_dump(mode="json"))
    found = calibrate(
        "study",
        study,
        [record(estimate_plan(MODEL, lora, plan, HARDWARE), 0.8)],
        model=MODEL,
        workload=lora.model_copy(update={"adapter": Lora(r=8, alpha=64)}),
        gpu_types={"h100-sxm": "h100"},
        nvml_names={"h100-sxm": []},
    )
    assert found.overall.tokens_per_s == pytest.approx(0.8) and found.notes == ()


def test_a_table_says_calibrated(capsys, write, estimates):
    folder = write([record(estimates[Engine.DDP][0])])
    _, out, _ = run(capsys, *ARGV, "--calibrate", folder)
    assert "calibrated" in out and "predicted" in out


def test_device_names_of_nvml_match(estimates):
    named = {"hardware": {"gpu": "NVIDIA H100 80GB HBM3"}}
    assert factors_of([record(estimates[Engine.DDP][0])], **named).gpu_type == "h100-sxm"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model": {"name": "llama", "config": load_model("qwen3-8b").hf_config}},
            "measured llama",
        ),
        ({"model": {"name": "x", "num_parameters": 7}}, "measured x, not qwen3-1.7b"),
        ({"model": "text"}, "measured an unnamed model"),
        ({"hardware": {"gpu": "l40s"}}, "measured on l40s, which is not among --gpu-type"),
    ],
)
def test_a_study_of_something_else(estimates, changes, words):
    with pytest.raises(AutotuneError, match=words):
        factors_of([record(estimates[Engine.DDP][0])], **changes)


def test_where_the_model_lies_is_no_other_model():
    check_model("study", contract(), MODEL.model_copy(update={"local_path": "/models/mine"}))


def test_a_study_without_a_measurement(estimates):
    failed = record(estimates[Engine.DDP][0], outcome=Outcome.OOM)
    with pytest.raises(AutotuneError, match="no trial that ran to the end"):
        factors_of([failed])


def test_the_committed_study_of_cpu_ranks(capsys):
    """Factors worked out from its lines alone, and what the cells come to with them."""
    model, hardware = load_model("tiny-qwen3"), load_hardware("cpu", 2)
    workload = Workload(seq_len=256, global_batch_size=8)
    lines = (DEMO / "trials.jsonl").read_text().splitlines()
    ran = [each for each in map(json.loads, lines) if each["outcome"] == "ok"]
    plans = [(Plan.from_dict(each["plan"]), each["step_s"]) for each in ran]
    ratios = sorted(
        estimate_plan(model, workload, plan, hardware).time.step_s / seconds
        for plan, seconds in plans
        if plan.engine is Engine.FSDP2
    )
    half = len(ratios) // 2
    middle = ratios[half] if len(ratios) % 2 else math.sqrt(ratios[half - 1] * ratios[half])
    argv = ["capacity", "--model", "tiny-qwen3", "--gpu-type", "cpu", "--gpus", "2"]
    argv += ["--tokens", "1M", "--seq-len", "256", "--global-batch-size", "8"]
    document = plan_of(capsys, *argv, "--strategies", "fsdp2", "--calibrate", str(DEMO))
    (cell,) = document["cells"]
    assert len(ratios) > 5 and cell["calibration"]["num_trials"] == len(ratios)
    assert cell["tokens_per_s"] == pytest.approx(cell["predicted_tokens_per_s"] * middle)
    assert not any("Predicted, not measured" in note for note in document["notes"])


def test_a_folder_that_is_no_study(capsys, tmp_path):
    code, out, err = run(capsys, *ARGV, "--calibrate", str(tmp_path))
    assert (code, out) == (2, "") and "is not a study folder" in err
