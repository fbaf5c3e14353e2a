"""ZeRO++ hpZ as a plan: its id, its file, its memory, what it spares between nodes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from autotune.config import load_config
from autotune.config.strategy import strategy_from_deepspeed
from autotune.emit.axolotl import emit_axolotl
from autotune.emit.deepspeed import deepspeed_config
from autotune.memory import estimate_memory
from autotune.plan import Plan
from autotune.planner import estimate_plan, make_plan
from autotune.spec.hardware import load_hardware
from autotune.spec.model import load_model
from autotune.spec.strategy import load_strategies
from autotune.spec.workload import Precision, Workload

MODEL = load_model("qwen3-8b")
WORKLOAD = Workload(seq_len=2048, global_batch_size=64)
TWO_NODES = load_hardware("h100-sxm", 16)
ZERO3 = make_plan(load_strategies(["zero3"])[0], TWO_NODES, micro_batch_size=1, grad_accum_steps=4)
HPZ = replace(ZERO3, strategy="zero3_hpz8", hpz=8)


def test_plans_without_it_keep_their_ids():
    assert "hpz" not in ZERO3.to_dict() and Plan.from_dict(ZERO3.to_dict()) == ZERO3
    assert HPZ.to_dict()["hpz"] == 8 and Plan.from_dict(HPZ.to_dict()) == HPZ
    assert HPZ.id != replace(HPZ, hpz=4).id != ZERO3.id


def test_the_preset_is_a_strategy_and_a_file_that_reads_back(tmp_path):
    strategy = strategy_from_deepspeed("zero3_bf16_hpz", MODEL, Precision.BF16)
    plan = make_plan(strategy, TWO_NODES, micro_batch_size=1, grad_accum_steps=4)
    assert plan == HPZ
    zero = deepspeed_config(plan, MODEL, WORKLOAD, device="cuda")["zero_optimization"]
    assert zero["zero_hpz_partition_size"] == 8
    file = tmp_path / "best.yml"
    file.write_text(emit_axolotl(MODEL, WORKLOAD, plan, base_model="qwen3-8b"))
    assert load_config(file).plan(16) == plan
    plain = deepspeed_config(ZERO3, MODEL, WORKLOAD, device="cuda")["zero_optimization"]
    assert "zero_hpz_partition_size" not in plain


def test_the_second_copy_takes_its_part_of_the_parameters():
    first, second = (estimate_memory(MODEL, WORKLOAD, plan, TWO_NODES) for plan in (ZERO3, HPZ))
    copy = 2 * MODEL.num_parameters / 8
    assert second.total_bytes - first.total_bytes == pytest.approx(copy, rel=1e-6)
    added = second.components["parameters"] - first.components["parameters"]
    assert added == pytest.approx(copy, rel=1e-6)


def test_later_gathers_stay_in_the_node():
    def step_s(plan):
        return estimate_plan(MODEL, WORKLOAD, plan, TWO_NODES).time.step_s

    assert step_s(HPZ) < step_s(ZERO3)
    one_micro_step = [
        replace(plan, micro_batch_size=4, grad_accum_steps=1) for plan in (ZERO3, HPZ)
    ]
    gains = [
        1 - step_s(hpz) / step_s(plain)
        for plain, hpz in ((ZERO3, HPZ), (one_micro_step[0], one_micro_step[1]))
    ]
    assert gains[0] > gains[1] >= 0, "more micro-steps read the copy more often"


@pytest.mark.parametrize("hpz", [1, 8])
def test_ids_are_canonical(hpz):
    plan = replace(ZERO3, hpz=hpz)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))).id == plan.id
