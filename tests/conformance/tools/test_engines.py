"""DeepSpeed's and accelerate's own code takes what is exported, and reads the plan in it.

Both are in the training stack, so this runs in `make test`, too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("deepspeed", reason="needs the training stack")

from autotune.emit.targets import export
from autotune.emit.to_deepspeed import standalone_config
from autotune.plan import Engine, Plan, Recompute
from autotune.resources import data_dir
from autotune.spec.workload import Precision, Workload
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


@pytest.mark.slow
def test_accelerate_launches_two_cpu_ranks(tmp_path):
    """DDP, the one engine that accelerate runs on CPU ranks."""
    plan = Plan(strategy="ddp", engine=Engine.DDP, dp_replicate=2, micro_batch_size=2)
    job = JOBS[0].with_plan(plan)
    job = type(job)(base_model=job.base_model, model=job.model, plan=plan, device="cpu",
                    workload=Workload(precision=Precision.FP32))  # fmt: skip
    main = write(export(job, "accelerate").files, tmp_path, "accelerate")
    (tmp_path / "script.py").write_text(
        "import json, sys, torch\n"
        "from accelerate import Accelerator\n"
        "accelerator = Accelerator(cpu=True)\n"
        "model = accelerator.prepare(torch.nn.Linear(4, 4))\n"
        "x = torch.full((2, 4), float(accelerator.process_index + 1))\n"
        "accelerator.backward(model(x).sum())\n"
        "grad = next(model.parameters()).grad\n"
        "print(json.dumps([accelerator.num_processes, type(model).__name__,\n"
        "                  grad[0, 0].item(), accelerator.mixed_precision]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file",
         main, "--main_process_port", "0", "script.py"],
        cwd=tmp_path,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[2")]
    # Rank 0 has gradient 2 of its two rows of ones, rank 1 has 4; the mean went through all-reduce.
    assert lines == [[2, "DistributedDataParallel", 3.0, "no"]] * 2
