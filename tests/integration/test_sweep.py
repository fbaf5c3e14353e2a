"""Real sweeps on CPU ranks."""

import json

import pytest

from autotune.calibrate.store import read_calibration
from autotune.calibrate.sweep import measure_machine
from autotune.cli import _guarded
from autotune.memory.knowledge import model_key
from autotune.memory.layers import Regime
from autotune.planner import make_plan
from autotune.spec.hardware import load_hardware
from autotune.spec.model import load_model
from autotune.spec.strategy import load_strategies
from autotune.spec.workload import Workload
from autotune.timing import Collective, estimate_time

ENGINES = {
    "ddp", "ddp-cp", "zero1", "zero2", "zero3", "fsdp2", "fsdp2-kept",
    "zero2-offload", "zero3-offload", "zero3-offload-all", "fsdp2-offload-all",
}  # fmt: skip


def test_two_ranks_measure_their_rates():
    found, notes = measure_machine("cpu", 2, item_s=0.002)
    assert notes == []
    assert {curve.kind for curve in found.collectives} == set(Collective)
    for curve in found.collectives:
        assert curve.ranks == 2
        # 16 MiB take longer than 4 KiB, on any machine.
        assert curve.times_s[-1] > curve.times_s[0]
    assert {point.rows for point in found.matmuls} == {128, 512, 2048}
    large = [p for p in found.matmuls if p.rows == 2048 and p.inputs == p.outputs == 1024]
    assert 1e8 < large[0].flops_per_s < 1e13
    assert 1e7 < found.elementwise_bytes_per_s < 1e12
    assert found.optimizer_s(1, 2**21) > found.optimizer_s(1, 2**18)
    assert found.models == () == found.engines


@pytest.mark.slow
def test_a_model_is_measured_with_its_engines(tmp_path):
    path = tmp_path / "c.json"
    words = ["doctor", "--measure", "--device", "cpu", "--gpus", "2", "--model", "tiny-qwen3",
             "--seq-len", "64", "--out", str(path), "--json"]  # fmt: skip
    assert _guarded(words) == 0
    found, model = read_calibration(path), load_model("tiny-qwen3")
    assert {times.regime for times in found.models} == {Regime.COMPUTE, Regime.AUTOCAST}
    assert {times.strategy for times in found.engines} == ENGINES
    assert {times.model for times in found.models} == {model_key(model)}
    hardware, workload = load_hardware("cpu", 2), Workload(seq_len=64, global_batch_size=4)
    for strategy in load_strategies(["ddp", "zero1", "zero3", "fsdp2"]):
        plan = make_plan(strategy, hardware, grad_accum_steps=2)
        time = estimate_time(model, workload, plan, hardware, found)
        tried = next(t for t in found.engines if t.strategy.startswith(strategy.name[:5]))
        assert time.step_s > 0
        assert tried.points[0].layers == 4
        assert min(time.components.values()) >= 0
    json.loads(path.read_text())
