"""Many plans at once get what each of them gets alone."""

import random

import numpy as np
import pytest

from autotune.memory import estimate_memory, estimate_memory_table
from autotune.plan import Engine, Plan, Recompute
from autotune.spec.hardware import load_hardware
from autotune.spec.model import load_model
from autotune.spec.workload import Workload

MODEL = load_model("tiny-qwen3")
WORKLOAD = Workload(seq_len=256, global_batch_size=64)
LAYOUTS = [
    {"engine": Engine.DDP, "dp_replicate": 4},
    {"engine": Engine.DEEPSPEED, "zero_stage": 1, "dp_shard": 4},
    {"engine": Engine.DEEPSPEED, "zero_stage": 2, "dp_shard": 2, "cp": 2},
    {"engine": Engine.DEEPSPEED, "zero_stage": 2, "dp_shard": 4, "offload_optimizer": True},
    {"engine": Engine.DEEPSPEED, "zero_stage": 3, "dp_shard": 8, "bucket_elements": 5000},
    {"engine": Engine.DEEPSPEED, "zero_stage": 3, "dp_shard": 1},
    {"engine": Engine.FSDP2, "dp_shard": 4, "dp_replicate": 2},
    {"engine": Engine.FSDP2, "dp_shard": 4, "reshard_after_forward": False},
    {"engine": Engine.FSDP2, "dp_shard": 2, "offload_params": True, "offload_optimizer": True},
]


def plans():
    made = [
        Plan(strategy="x", micro_batch_size=batch, grad_accum_steps=steps, recompute=mode, **layout)
        for layout in LAYOUTS
        for batch in (1, 2, 8)
        for steps in (1, 2, 5)
        for mode in Recompute
    ]
    random.Random(0).shuffle(made)  # a table keeps the order, whatever it groups
    return made


@pytest.mark.parametrize("device", ["cpu", "h100-sxm"])
def test_a_table_says_what_each_plan_gets_alone(device):
    hardware, all_plans = load_hardware(device, 8), plans()
    table = estimate_memory_table(MODEL, WORKLOAD, all_plans, hardware)
    for number, plan in enumerate(all_plans):
        alone = estimate_memory(MODEL, WORKLOAD, plan, hardware)
        assert table.total_bytes[number] == pytest.approx(alone.total_bytes, abs=20)
        assert table.host_bytes[number] == pytest.approx(alone.host_bytes, abs=2)
        assert table.allocator_bytes[number] == pytest.approx(alone.allocator_bytes, abs=20)
        named = table.peak_instants[table.peak_instant[number]]
        assert alone.instants[named] == pytest.approx(alone.total_bytes, abs=20)
        assert sum(alone.components.values()) == alone.total_bytes


def test_the_later_micro_steps_are_only_those_plans_that_have_them():
    hardware = load_hardware("h100-sxm", 8)
    fsdp = {"strategy": "x", "engine": Engine.FSDP2, "dp_shard": 8}
    pair = [Plan(**fsdp), Plan(**fsdp, grad_accum_steps=4)]
    table = estimate_memory_table(load_model("qwen3-8b"), WORKLOAD, pair, hardware)
    names = [table.peak_instants[i] for i in table.peak_instant]
    assert not names[0].startswith("later_") and names[1].startswith("later_")
    # Without synchronisation the gradients stay whole.
    more = np.diff(table.total_bytes)[0]
    assert more > 3 * load_model("qwen3-8b").num_parameters
