"""DeepSpeed's and accelerate's own code takes what is exported, and reads the plan in it.

Both are in the training stack, so this runs in `make test`, too.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("deepspeed", reason="needs the training stack")

from autotune.emit.targets import export
from autotune.emit.to_deepspeed import standalone_config
from autotune.plan import Engine, Recompute
from autotune.resources import data_dir
from autotune.spec.workload import Precision
from tests.conformance.plan_samples import COUNT, sample_jobs
from tests.conformance.tools.ask import ask

JOBS = sample_jobs()
COUNTS = pytest.mark.parametrize(
    "count", [pytest.param(60, id="60"), pytest.param(COUNT, marks=pytest.mark.slow, id="all")]
)
# What DeepSpeed has refused since 0.18, in files Axolotl still ships; `autotune` reads them.
REFUSED_PRESETS = {"zero1_torch_compile.json", "zero2_torch_compile.json"}


def write(files, folder: Path, stem: str) -> str:
    """Write an export's files so that many lie in one folder, and return the main one's name."""
    for name, text in files.items():
        (folder / name).write_text(text)
    main = next(iter(files))
    assert main.startswith(stem)
    return main


@COUNTS
def test_deepspeed_reads_every_plan(count, tmp_path):
    jobs = [job for job in JOBS[:count] if job.plan.engine is Engine.DEEPSPEED]
    assert len(jobs) > 0.3 * count
    configs = [json.loads(next(iter(export(job, "deepspeed").files.values()))) for job in jobs]
    assert '"auto"' not in json.dumps(configs)
    asked = [
        # Its own rule counts the sequence-parallel ranks as one.
        {"ranks": job.plan.world_size, "config": config}
        for job, config in zip(jobs, configs, strict=True)
    ]
    answers = ask(sys.executable, "check_deepspeed.py", asked, tmp_path)
    for job, got in zip(jobs, answers, strict=True):
        plan = job.plan
        assert got["error"] is None, got
        assert got["stage"] == plan.zero_stage
        assert got["micro_batch_size"] == plan.micro_batch_size
        assert got["grad_accum_steps"] == plan.grad_accum_steps
        assert got["train_batch_size"] == plan.global_batch_size
        assert got["offload_optimizer"] == ("cpu" if plan.offload_optimizer else None)
        assert got["offload_params"] == ("cpu" if plan.offload_params else None)
        assert got["bucket"] == (plan.bucket_elements or job.model.hidden_size**2)
        assert got["clipping"] == job.train.max_grad_norm
        assert got["bf16"] == (job.workload.precision is Precision.BF16)


def test_deepspeed_refuses_a_broken_export(tmp_path):
    job = next(job for job in JOBS if job.plan.engine is Engine.DEEPSPEED)
    typo, batch = standalone_config(job), standalone_config(job)
    typo["zero_optimization"]["stag"] = 2
    batch["train_batch_size"] += 1
    asked = [{"ranks": job.plan.data_parallel_size, "config": config} for config in (typo, batch)]
    for got in ask(sys.executable, "check_deepspeed.py", asked, tmp_path):
        assert got["error"]


def test_deepspeed_takes_the_presets(tmp_path):
    names = sorted(file.name for file in data_dir("deepspeed_configs").iterdir()
                   if file.name.endswith(".json"))  # fmt: skip
    configs = [
        json.loads((data_dir("deepspeed_configs") / name).read_text()) | {
            # The Trainer fills these from its own arguments.
            "train_batch_size": 8, "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 2, "gradient_clipping": 1.0,
        }
        for name in names
    ]  # fmt: skip
    for config in configs:
        for block in ("bf16", "fp16"):
            if config.get(block, {}).get("enabled") == "auto":
                config[block]["enabled"] = block == "bf16"
    asked = [{"ranks": 2, "config": config} for config in configs]
    answers = ask(sys.executable, "check_deepspeed.py", asked, tmp_path)
    refused = {name for name, got in zip(names, answers, strict=True) if got["error"]}
    assert refused <= REFUSED_PRESETS
    for name, got in zip(names, answers, strict=True):
        assert got["error"] or f"zero{got['stage']}" in name


@COUNTS
def test_accelerate_reads_every_plan(count, tmp_path):
    jobs = [job for job in JOBS[:count] if not (job.plan.engine is Engine.DDP and job.plan.cp > 1)]
    files = [
        write(export(job, "accelerate", f"plan{number}.yaml").files, tmp_path, "plan")
        for number, job in enumerate(jobs)
    ]
    answers = ask(sys.executable, "check_accelerate.py", files, tmp_path)
    for job, got in zip(jobs, answers, strict=True):
        plan = job.plan
        assert got["error"] is None, got
        assert got["ranks"] == plan.world_size
        cp = plan.cp
        if plan.engine is Engine.FSDP2:
            assert got["type"] == "FSDP" and got["version"] == 2
            assert got["reshard"] is plan.reshard_after_forward
            assert got["offload"] == (
                "CPUOffloadPolicy" if plan.offload_params else "OffloadPolicy"
            )
            assert got["recompute"] is (plan.recompute is Recompute.FULL)
            if cp > 1 or plan.dp_replicate > 1:
                assert got["sizes"] == [plan.dp_replicate, plan.dp_shard, cp, 1]
        elif plan.engine is Engine.DEEPSPEED:
            assert got["type"] == "DEEPSPEED" and got["stage"] == plan.zero_stage
            assert got["config"]["train_micro_batch_size_per_gpu"] == plan.micro_batch_size
            assert got["config"]["gradient_accumulation_steps"] == plan.grad_accum_steps
            if cp > 1:
                assert got["sizes"] == [1, plan.dp_shard, 1, cp]
        else:
            assert got["type"] == ("MULTI_GPU" if plan.world_size > 1 else "NO")


def test_accelerate_refuses_a_broken_export(tmp_path):
    job = next(job for job in JOBS if job.plan.engine is Engine.DEEPSPEED)
    files = export(job, "accelerate").files
    main = write(files, tmp_path, "accelerate")
    (tmp_path / main).write_text(files[main] + "mixed_precision: bf16\n")
    (tmp_path / "unknown.yaml").write_text(files[main] + "num_process: 2\n")
    for got in ask(sys.executable, "check_accelerate.py", [main, "unknown.yaml"], tmp_path):
        assert got["error"]
