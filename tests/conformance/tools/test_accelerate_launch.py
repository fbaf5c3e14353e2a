"""`accelerate launch --config_file` with what is exported, for real, on 2 CPU ranks.

Every engine takes one step of SGD and must arrive at the weights of one process over the tokens of
both ranks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("deepspeed", reason="needs the training stack")

from autotune.emit.job import Device, Job
from autotune.emit.targets import export
from autotune.plan import Engine, Plan, Recompute
from autotune.spec.model import load_model
from autotune.spec.training import TrainSettings
from autotune.spec.workload import Precision, Workload
from autotune.trial.native_ops import native_ops_dir
from tests.integration.ranks import small_config

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parent / "launched.py"
CHECKOUT = Path(__file__).resolve().parents[3]


def launch(plan: Plan, folder: Path, *options: str, device: Device = "cuda") -> dict[str, Any]:
    """Export the plan, launch it and return what rank 0 wrote."""
    job = Job(
        base_model="tiny-qwen3", model=load_model("tiny-qwen3"), plan=plan, device=device,
        workload=Workload(precision=Precision.FP32, optimizer="sgd"),
        train=TrainSettings(max_grad_norm=0.0),
    )  # fmt: skip
    files = export(job, "accelerate", "run.yaml").files
    for name, text in files.items():
        (folder / name).write_text(text)
    (folder / "model.json").write_text(json.dumps(small_config()))
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file",
         "run.yaml", "--main_process_port", "0", str(SCRIPT), "model.json", "answer.json",
         *options],
        cwd=folder,
        env=os.environ | {
            "PYTHONPATH": str(CHECKOUT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(native_ops_dir()),
            "HF_HOME": str(folder),
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[:3000] + done.stderr[-1000:]
    answer: dict[str, Any] = json.loads((folder / "answer.json").read_text())
    return answer


def assert_followed(answer: dict[str, Any]) -> None:
    assert answer["compared"] > 20
    assert answer["moved"] > 1e-3, "a step that moves nothing compares nothing"
    assert answer["off_by"] < 1e-5


def test_ddp(tmp_path: Path) -> None:
    plan = Plan(strategy="ddp", engine=Engine.DDP, dp_replicate=2, micro_batch_size=2)
    answer = launch(plan, tmp_path, "cpu", device="cpu")
    assert (answer["model"], answer["ranks"]) == ("DistributedDataParallel", 2)
    assert_followed(answer)


@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("recompute", list(Recompute))
def test_fsdp2(reshard: bool, recompute: Recompute, tmp_path: Path) -> None:
    """What the file says of FSDP2, once accelerate is told to take CPU ranks for GPUs."""
    plan = Plan(
        strategy="fsdp2", engine=Engine.FSDP2, dp_shard=2, micro_batch_size=2,
        reshard_after_forward=reshard, recompute=recompute,
    )  # fmt: skip
    answer = launch(plan, tmp_path, "gpus")
    assert (answer["model"], answer["ranks"]) == ("FSDP2", 2)
    assert answer["resharded"] == [reshard] * 2
    assert answer["recomputed"] == (2 if recompute is Recompute.FULL else 0)
    assert_followed(answer)


def test_accelerate_runs_fsdp2_on_cpu_ranks_as_nothing(tmp_path: Path) -> None:
    """Without a word: why an FSDP2 export for CPU ranks is refused."""
    plan = Plan(strategy="fsdp2", engine=Engine.FSDP2, dp_shard=2)
    answer = launch(plan, tmp_path)
    assert answer["model"] == "Qwen3ForCausalLM"


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed(stage: int, tmp_path: Path) -> None:
    """DeepSpeed runs on both ranks, though accelerate counts one process where there is no GPU.

    Its data loaders would give both the same rows: why a DeepSpeed export for CPU ranks is refused.
    """
    plan = Plan(
        strategy=f"zero{stage}", engine=Engine.DEEPSPEED, zero_stage=stage, dp_shard=2,
        micro_batch_size=2,
    )  # fmt: skip
    answer = launch(plan, tmp_path)
    assert (answer["model"], answer["stage"]) == ("DeepSpeedEngine", stage)
    assert (answer["ranks"], answer["accelerate_counts"]) == (2, 1)
    assert_followed(answer)
