"""Axolotl, torchtitan and LLaMA-Factory take what is written for them and read the plan in it.

`make conformance` runs it; without the tools' environments every test says why it is skipped.
"""

from __future__ import annotations

import shlex
from dataclasses import replace

from autotune.emit.axolotl import emit_axolotl
from autotune.emit.targets import export
from autotune.emit.to_torchtitan import MODELS
from autotune.plan import Engine, Recompute
from autotune.spec.model import load_model
from autotune.spec.workload import Precision
from tests.conformance.plan_samples import DATASETS, sample_jobs
from tests.conformance.tools.ask import ask
from tests.conformance.tools.environments import python_of

JOBS = sample_jobs()
OURS = {"AXOLOTL_DO_NOT_TRACK": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}


def rings_packed_batches(job) -> bool:
    """What Axolotl refuses: its ring attention with packed sequences, several at a time."""
    return job.plan.cp > 1 and job.workload.packing and job.plan.micro_batch_size > 1


def test_axolotl_accepts_every_export(tmp_path):
    python = python_of("axolotl")
    jobs = [job for job in JOBS if not (job.plan.engine is Engine.DDP and job.plan.cp > 1)]
    asked = []
    for number, job in enumerate(jobs):
        (name, text), *others = export(job, "axolotl", f"{number}.yml").files.items()
        assert not others
        (tmp_path / name).write_text(text)
        asked.append({"file": name, "ranks": job.plan.world_size})
    answers = ask(python, "check_axolotl.py", asked, tmp_path, **OURS)
    assert [got["error"] for got in answers if got["error"]] == []
    for job, got in zip(jobs, answers, strict=True):
        plan = job.plan
        product = 1
        for size in got["mesh"].values():
            product *= size
        assert product == plan.world_size, (plan, got)
        assert got["mesh"].get("cp_size", 1) == plan.cp
        batch = got["micro_batch_size"] * got["grad_accum_steps"]
        assert batch == plan.micro_batch_size * plan.grad_accum_steps
        if not rings_packed_batches(job):
            assert got["micro_batch_size"] == plan.micro_batch_size
        assert got["recompute"] is (plan.recompute is Recompute.FULL)
        assert got["deepspeed"] is (plan.engine is Engine.DEEPSPEED)
        if plan.engine is Engine.FSDP2:
            assert got["fsdp"]["reshard_after_forward"] is plan.reshard_after_forward
            assert got["fsdp"]["offload_params"] is plan.offload_params
            assert got["mesh"].get("dp_replicate_size", 1) == plan.dp_replicate


def test_axolotl_accepts_every_best_yml(tmp_path):
    """All but what its own ring attention cannot run, and that for this reason alone."""
    python = python_of("axolotl")
    asked = []
    for number, job in enumerate(JOBS):
        text = emit_axolotl(job.model, job.workload, job.plan, train=job.train, datasets=DATASETS)
        (tmp_path / f"{number}.yml").write_text(text)
        asked.append({"file": f"{number}.yml", "ranks": job.plan.world_size})
    answers = ask(python, "check_axolotl.py", asked, tmp_path, **OURS)
    refused = 0
    for job, got in zip(JOBS, answers, strict=True):
        if rings_packed_batches(job):
            assert "micro_batch_size must be set to 1 when sample_packing" in got["error"]
            refused += 1
        else:
            assert got["error"] is None, (job.plan, got)
    assert 0 < refused < 0.2 * len(JOBS)


def test_axolotl_refuses_a_broken_file(tmp_path):
    python = python_of("axolotl")
    job = next(job for job in JOBS if job.plan.engine is Engine.FSDP2 and job.plan.cp == 1
               and job.plan.dp_replicate == 1)  # fmt: skip
    text = emit_axolotl(job.model, job.workload, job.plan, datasets=DATASETS)
    # Sizes too small for the 8 ranks; too large ones it rounds down and takes.
    broken = [text.replace("reshard_after_forward: ", "reshard_after_forward: FULL_"),
              text.replace("learning_rate", "learningrate"),
              text + "dp_shard_size: 2\ndp_replicate_size: 2\n"]  # fmt: skip
    for number, content in enumerate(broken):
        (tmp_path / f"{number}.yml").write_text(content)
    asked = [{"file": f"{number}.yml", "ranks": 8} for number in range(len(broken))]
    answers = ask(python, "check_axolotl.py", asked, tmp_path, **OURS)
    assert all(got["error"] for got in answers), answers


def torchtitan_jobs(count: int):
    jobs = [
        replace(job, workload=job.workload.model_copy(update={"adapter": None}))
        for job in JOBS
        if job.plan.engine is Engine.FSDP2 or (job.plan.engine is Engine.DDP and job.plan.cp == 1)
    ]
    return jobs[:count]


def flags_of(script: str) -> list[str]:
    """Return what the script gives to torchtitan, as the shell would."""
    command = script.split("-m torchtitan.train", 1)[1].replace("\\\n", " ")
    return shlex.split(command)


def test_torchtitan_parses_its_command(tmp_path):
    python = python_of("torchtitan")
    jobs = torchtitan_jobs(60)
    named = [replace(job, model=job.model.model_copy(update={"name": "qwen3-1.7b"}))
             for job in jobs]  # fmt: skip
    asked = [flags_of(next(iter(export(job, "torchtitan").files.values()))) for job in named]
    answers = ask(python, "check_torchtitan.py", asked, tmp_path)
    for job, got in zip(jobs, answers, strict=True):
        plan = job.plan
        assert got["error"] is None, got
        assert (got["dp_replicate"], got["dp_shard"], got["cp"]) == (
            plan.dp_replicate, plan.dp_shard, plan.cp,
        )  # fmt: skip
        assert got["reshard"] == ("always" if plan.reshard_after_forward else "never")
        assert got["micro_batch_size"] == plan.micro_batch_size
        assert got["global_batch_size"] == plan.global_batch_size
        assert got["offload"] is plan.offload_params
        assert got["seq_len"] == job.workload.seq_len
        full = "FullAC.Config" if plan.recompute is Recompute.FULL else "NoneType"
        assert got["recompute"] == full
        bf16 = job.workload.precision is Precision.BF16
        assert got["param_dtype"] == ("bfloat16" if bf16 else "float32")


def test_torchtitan_has_the_models_we_name(tmp_path):
    python = python_of("torchtitan")
    asked = [["--module", module, "--config", config] for module, config in MODELS.values()]
    asked.append(["--module", "qwen3", "--config", "qwen3_9b"])
    asked.append(["--module", "qwen3", "--config", "qwen3_1_7b", "--training.local_batch_siz", "1"])
    answers = ask(python, "check_torchtitan.py", asked, tmp_path)
    for got in answers[:-2]:
        # torchtitan's own configuration of the 405B model trains in float8 and asks for its GPU.
        assert got["error"] is None or "float8 is only supported on" in got["error"]
    assert all(got["error"] for got in answers[-2:])
    for name in MODELS:
        assert load_model(name).name == name


def test_llamafactory_parses_its_file(tmp_path):
    python = python_of("llamafactory")
    jobs = [job for job in JOBS if job.plan.cp == job.plan.tp == 1][:200]
    asked = []
    for number, job in enumerate(jobs):
        files = export(job, "llamafactory", f"{number}.yaml").files
        for name, text in files.items():
            (tmp_path / name).write_text(text)
        asked.append({"file": f"{number}.yaml", "ranks": job.plan.world_size})
    answers = ask(python, "check_llamafactory.py", asked, tmp_path)
    for job, got in zip(jobs, answers, strict=True):
        plan = job.plan
        assert got["error"] is None, got
        assert got["micro_batch_size"] == plan.micro_batch_size
        assert got["grad_accum_steps"] == plan.grad_accum_steps
        # FSDP2 recomputes by accelerate's file alone.
        own = plan.engine is not Engine.FSDP2
        assert got["recompute"] is (plan.recompute is Recompute.FULL and own)
        assert got["bf16"] is (job.workload.precision is Precision.BF16)
        assert got["packing"] is job.workload.packing
        assert got["adapter"] == ("lora" if job.workload.adapter else "full")
        assert got["max_grad_norm"] == job.train.max_grad_norm
        assert (got["deepspeed"] is not None) is (plan.engine is Engine.DEEPSPEED)


def test_llamafactory_refuses_a_broken_file(tmp_path):
    python = python_of("llamafactory")
    job = next(job for job in JOBS if job.plan.engine is Engine.DDP and job.plan.cp == 1)
    text = next(iter(export(job, "llamafactory").files.values()))
    (tmp_path / "broken.yaml").write_text(text + "per_device_train_batchsize: 2\n")
    sharded = next(job for job in JOBS if job.plan.engine is Engine.DEEPSPEED and job.plan.cp == 1)
    for name, content in export(sharded, "llamafactory", "sharded.yaml").files.items():
        (tmp_path / name).write_text(content)
    asked = [{"file": "broken.yaml", "ranks": 1},
             {"file": "sharded.yaml", "ranks": sharded.plan.world_size + 1}]  # fmt: skip
    typo, ranks = ask(python, "check_llamafactory.py", asked, tmp_path)
    assert "per_device_train_batchsize" in typo["error"]
    assert "train_batch_size" in ranks["error"]
