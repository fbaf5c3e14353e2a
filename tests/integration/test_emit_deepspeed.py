"""DeepSpeed itself on what `deepspeed_config` writes: accepted, and in the types it promises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from autotune.emit.deepspeed import deepspeed_config
from autotune.plan import Engine, Plan
from autotune.spec.model import load_model
from autotune.spec.strategy import load_strategies
from autotune.spec.workload import Precision, Workload
from autotune.trial.launch import native_ops_dir
from autotune.trial.native_ops import build_native_ops
from tests.integration.ranks import make_plan, trial_request

pytestmark = pytest.mark.integration
ROOT = Path(__file__).resolve().parents[2]
STRATEGIES = [s for s in load_strategies(None) if s.engine is Engine.DEEPSPEED]

PARSE = """
import json, sys, warnings
from deepspeed.runtime.config import DeepSpeedConfig
for name, config in json.load(sys.stdin).items():
    parsed = DeepSpeedConfig(config)
    zero = parsed.zero_config
    print("PARSED", json.dumps([name, int(zero.stage), parsed.train_batch_size,
          str(parsed.communication_data_type), parsed.grad_accum_dtype,
          zero.reduce_bucket_size, zero.prefetch_bucket_size, zero.param_persistence_threshold,
          bool(zero.offload_optimizer and zero.offload_optimizer.device == "cpu"),
          bool(zero.offload_param and zero.offload_param.device == "cpu")]))
"""


def environment() -> dict[str, str]:
    return os.environ | {
        "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
        "TORCH_EXTENSIONS_DIR": str(native_ops_dir()),
    }  # fmt: skip


def parse(configs: dict[str, dict], script: str = PARSE) -> dict[str, list]:
    """Return what a script prints of each configuration as DeepSpeed reads it."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], input=json.dumps(configs),
        env=environment(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line[7:] for line in done.stdout.splitlines() if line.startswith("PARSED ")]
    return {values[0]: values[1:] for values in map(json.loads, lines)}


def test_deepspeed_accepts_every_strategy():
    model = load_model("tiny-qwen3")
    configs, expected = {}, {}
    for strategy in STRATEGIES:
        for precision in Precision:
            plan = Plan(
                strategy=strategy.name, engine=strategy.engine, zero_stage=strategy.zero_stage,
                offload_optimizer=strategy.offload_optimizer,
                offload_params=strategy.offload_params,
                micro_batch_size=2, grad_accum_steps=3,
            )  # fmt: skip
            name = f"{strategy.name}-{precision}"
            configs[name] = deepspeed_config(
                plan, model, Workload(precision=precision), device="cuda"
            )
            expected[name] = [
                plan.zero_stage, 6, "torch.float32", "fp32", 65536,
                65536 if plan.zero_stage == 3 else 50_000_000,
                2560 if plan.zero_stage == 3 else 100_000,
                plan.offload_optimizer, plan.offload_params,
            ]  # fmt: skip
    parsed = parse(configs)
    assert parsed == expected


@pytest.mark.slow  # in make test, test_bf16.py compares what comes of it
def test_gradients_are_reduced_and_accumulated_in_fp32(tmp_path):
    out = tmp_path / "numerics.json"
    build_native_ops(
        trial_request(make_plan("zero2_offload_optimizer", 2), tmp_path, rungs=[]), tmp_path
    )
    worker = Path(__file__).with_name("deepspeed_numerics_worker.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone",
         "--nproc-per-node", "2", str(worker), str(out)],
        env=environment(), capture_output=True, text=True, timeout=550, check=False,
    )  # fmt: skip
    assert out.exists(), done.stderr[-3000:]
    results = json.loads(out.read_text())
    without = results.pop("zero2_without")
    stages = ("zero1", "zero2", "zero3")
    assert set(results) == {*stages, *(f"{stage}_offload" for stage in stages)}
    assert all(result == {"accumulated": -128.5, "reduced": -64.25} for result in results.values())
    # DeepSpeed's own defaults lose the last bit: the test can tell.
    assert without == {"accumulated": -128.0, "reduced": -64.0}
