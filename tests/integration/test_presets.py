"""The shipped DeepSpeed presets: accepted by DeepSpeed, and each trains from a file by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from autotune.config import preset_names
from autotune.resources import data_dir
from autotune.spec.workload import Workload
from autotune.trial.launch import Limits
from autotune.trial.protocol import Outcome
from tests.integration.commands import autotune, write_model
from tests.integration.ranks import (
    logged,
    make_plan,
    run,
    small_config,
    training_request,
)
from tests.integration.test_emit_deepspeed import parse

pytestmark = pytest.mark.integration

# What the plan of each preset must say; the checks after prepare hold the engine to it.
PLANS = {
    "zero1.json": (1, False, False),
    "zero1_torch_compile.json": (1, False, False),
    "zero2.json": (2, False, False),
    "zero2_cpuoffload.json": (2, True, False),
    "zero3.json": (3, False, False),
    "zero3_bf16.json": (3, False, False),
    "zero3_bf16_cpuoffload_params.json": (3, False, True),
    "zero3_bf16_cpuoffload_optimizer.json": (3, True, False),
    "zero3_bf16_cpuoffload_all.json": (3, True, True),
    "zero3_bf16_hpz.json": (3, False, False),
}

# transformers fills "auto" from its own arguments before DeepSpeed sees the file.
PARSE = """
import json, sys
from types import SimpleNamespace
from deepspeed.runtime.config import DeepSpeedConfig
from transformers import TrainingArguments
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig
model = SimpleNamespace(config=SimpleNamespace(hidden_size=64))
for name, config in json.load(sys.stdin).items():
    args = TrainingArguments(output_dir="unused", use_cpu=True, bf16=True, max_grad_norm=0.7,
                             per_device_train_batch_size=3, gradient_accumulation_steps=2)
    try:
        filled = HfTrainerDeepSpeedConfig(config)
        filled.trainer_config_process(args)
        filled.trainer_config_finalize(args, model, 10)
        parsed = DeepSpeedConfig(filled.config)
    except ValueError as error:
        print("PARSED", json.dumps([name, str(error)]))
        continue
    zero = parsed.zero_config
    print("PARSED", json.dumps([
        name, "auto" in json.dumps(filled.config), int(zero.stage), parsed.train_batch_size,
        parsed.gradient_clipping, zero.reduce_bucket_size, parsed.bfloat16_config.enabled,
        str(parsed.communication_data_type), parsed.grad_accum_dtype,
        bool(zero.offload_optimizer and zero.offload_optimizer.device == "cpu"),
        bool(zero.offload_param and zero.offload_param.device == "cpu")]))
"""


def test_deepspeed_accepts_every_preset_that_transformers_has_filled() -> None:
    folder = data_dir("deepspeed_configs")
    presets = {name: json.loads((folder / name).read_text("utf-8")) for name in preset_names()}
    # What Axolotl's zero1_torch_compile.json carries: why ours says it otherwise.
    old = presets["zero1.json"] | {"compile": {"disable": False, "backend": "inductor"}}
    parsed = parse(presets | {"old": old}, PARSE)
    assert "disable" in parsed.pop("old")[0]
    assert parsed == {
        name: [False, stage, 6, 0.7, 4096, True, "torch.float32", "fp32", *offload]
        for name, (stage, *offload) in PLANS.items()
    }


def write_config(folder: Path, corpus: Path, **more: object) -> Path:
    values = {
        "base_model": str(write_model(folder / "model", num_hidden_layers=1)),
        "datasets": [{"path": str(corpus), "type": "completion"}],
        "sequence_len": 64,
        "sample_packing": True,
        "micro_batch_size": 2,
        "learning_rate": 0.003,
        "lr_scheduler": "constant",
        "max_steps": 3,
        "bf16": "auto",
        "output_dir": str(folder / "out"),
    } | more
    config = folder / "config.yml"
    config.write_text(yaml.safe_dump(values))
    return config


def test_zero3_on_one_gpu_needs_no_environment(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What other launchers set for DeepSpeed is not the user's business here."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    config = write_config(tmp_path, corpus, max_steps=1)
    flags = ("--deepspeed", "zero3_bf16", "--gpus", "1", "--device", "cpu", "--json")
    done = autotune("train", str(config), *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    asserted = json.loads(done.stdout)["asserted"]
    assert (asserted["engine"], asserted["zero_stage"]) == ("deepspeed", 3)
    assert asserted["groups"]["world"] == 1


@pytest.mark.parametrize(
    "preset",
    # That of hpZ is for two nodes: test_the_second_copy_... runs it on 4 ranks.
    [name for name in preset_names() if name != "zero3_bf16_hpz.json"],
)
@pytest.mark.slow
def test_a_file_by_hand_trains_with_the_preset(preset: str, tmp_path: Path, corpus: Path) -> None:
    out = tmp_path / "out"
    config = write_config(tmp_path, corpus, deepspeed=f"deepspeed_configs/{preset}")
    done = autotune("train", str(config), "--json", "--gpus", "2", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    asserted = document["asserted"]
    plan = json.loads((out / "launches" / "0001" / "request.json").read_text())["plan"]
    stage, offload_optimizer, offload_params = PLANS[preset]
    assert (document["steps"], asserted["engine"], asserted["zero_stage"]) == (
        3,
        "deepspeed",
        stage,
    )
    assert (plan["offload_optimizer"], plan["offload_params"]) == (
        offload_optimizer,
        offload_params,
    )
    losses = logged(out, "loss")
    assert len(losses) == 3 and losses[-1] < losses[0]
    if "compile" in preset:
        assert asserted["compiled_layers"] == 1 and asserted["compiled_graphs"] >= 1
    else:
        assert "compiled_layers" not in asserted


def test_a_run_that_compiles_nothing_is_invalid(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    request = training_request(
        make_plan("ddp", 1, micro_batch_size=2),
        tmp_path,
        data=corpus,
        workload=Workload(seq_len=64, global_batch_size=2),
        max_steps=1,
        torch_compile=True,
    )
    ended = run(request)
    assert ended.outcome is Outcome.INVALID
    assert "asked for torch.compile" in ended.message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "world", "changes"),
    [
        ("ddp", 2, {"cp": 2}),
        ("ddp", 2, {"recompute": True}),
        ("zero2", 2, {}),
        ("fsdp2", 2, {}),
        ("fsdp2", 2, {"recompute": True}),
    ],
)
def test_compiled_training_follows_the_uncompiled(
    strategy: str, world: int, changes: dict, tmp_path: Path, corpus: Path
) -> None:
    """Twelve layers: more than dynamo's limit of variants, so one must serve all of them."""
    losses = []
    for compiled in (False, True):
        plan = make_plan(strategy, world, micro_batch_size=2, **changes)
        folder = tmp_path / str(compiled)
        request = training_request(
            plan,
            folder,
            data=corpus,
            workload=Workload(seq_len=64, global_batch_size=plan.global_batch_size),
            config=small_config(num_hidden_layers=12),
            learning_rate=3e-3,
            max_steps=3,
            torch_compile=compiled,
        )
        # A rank that compiles sends no heartbeat; on a busy machine that may take minutes.
        ended = run(request, Limits(deadline_s=900, hang_s=600))
        assert ended.outcome is Outcome.OK, ended.message
        assert ended.results[0].asserted.get("compiled_layers") == (12 if compiled else None)
        losses.append(logged(folder, "loss"))
    assert losses[1] == pytest.approx(losses[0], abs=5e-3)
