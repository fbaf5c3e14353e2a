"""Memory of a base in 4 bits, an 8-bit optimizer and other losses, by engine."""

import pytest

from autotune.cli.tables import describe_workload
from autotune.memory import estimate_memory
from autotune.memory.closed_form import closed_form_profile
from autotune.memory.setup import Loss, Optimizer, setup_of, unestimated
from autotune.plan import Engine, Plan, Recompute
from autotune.spec.hardware import load_hardware
from autotune.spec.model import load_model
from autotune.spec.workload import LigerKernel, Lora, Workload

MODEL = load_model("qwen3-8b")
HARDWARE = load_hardware("h100-sxm", 4)
ADAPTER = Lora(r=8, target_modules=tuple(MODEL.linears))
WEIGHTS = MODEL.num_layers * sum(a * b for a, b in MODEL.linears.values())
REST = MODEL.num_parameters - WEIGHTS
ADDED = MODEL.num_adapter_parameters(ADAPTER)
SCALES = WEIGHTS * (1 / 64 + 4 / (64 * 256))  # double quantisation
PLANS = {
    "ddp": Plan(strategy="ddp", engine=Engine.DDP, dp_replicate=4),
    "zero2": Plan(strategy="zero2", engine=Engine.DEEPSPEED, zero_stage=2, dp_shard=4),
    "zero3": Plan(strategy="zero3", engine=Engine.DEEPSPEED, zero_stage=3, dp_shard=4),
    "fsdp2": Plan(strategy="fsdp2", engine=Engine.FSDP2, dp_shard=4),
}
# Bytes of a stored weight that is not quantised, and ranks the parameters are spread over.
STORED = {"ddp": (4, 1), "zero2": (2, 1), "zero3": (2, 4), "fsdp2": (4, 4)}


def workload(**values):
    return Workload(**({"seq_len": 512, "global_batch_size": 4} | values))


def estimate(name, storage):
    adapter = ADAPTER.model_copy(update={"base_storage": storage})
    return of(PLANS[name], workload(adapter=adapter))


def of(plan, asked):
    setup = setup_of(MODEL, asked, plan, HARDWARE)
    plain = setup_of(MODEL, workload(adapter=asked.adapter), plan, HARDWARE)
    profile = closed_form_profile(MODEL, plain.key)
    return estimate_memory(MODEL, asked, plan, HARDWARE, setup=setup, profile=profile)


@pytest.mark.parametrize("name", PLANS)
def test_parameters(name):
    stored, shards = STORED[name]
    whole, packed = (estimate(name, s).components["parameters"] for s in (None, "nf4_double"))
    assert whole == pytest.approx(stored * (MODEL.num_parameters + ADDED) / shards, rel=1e-3)
    want = (stored * (REST + ADDED) + WEIGHTS / 2) / shards + SCALES
    assert packed == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("name", PLANS)
def test_the_peak_is_lower_by_less_than_what_is_stored_less(name):
    whole, packed = estimate(name, None), estimate(name, "nf4")
    stored, shards = STORED[name]
    assert packed.total_bytes < whole.total_bytes
    saved = whole.total_bytes - packed.total_bytes
    gathered = whole.components["gathered_parameters"] - packed.components["gathered_parameters"]
    assert saved <= (stored - 0.5) * WEIGHTS / shards + gathered
    # An unpacked matrix comes besides, in the compute type.
    largest = max(a * b for a, b in MODEL.linears.values())
    assert packed.components["temporaries"] >= 2 * largest or "layer" not in packed.peak_instant


def test_dora_adds_a_number_an_output():
    outputs = MODEL.num_layers * sum(outputs for _, outputs in MODEL.linears.values())
    dora = ADAPTER.model_copy(update={"dora": True, "rslora": True})
    assert MODEL.num_adapter_parameters(dora) == ADDED + outputs


def test_an_8_bit_optimizer_has_two_bytes_a_weight_and_scales():
    fp32, bits8, paged = (
        of(PLANS["zero2"], workload(optimizer=o)).components["optimizer"]
        for o in ("adamw", "adamw_8bit", "paged_adamw_8bit")
    )
    of_rank = MODEL.num_parameters / 4
    assert fp32 == pytest.approx(12 * of_rank, rel=1e-3)
    assert bits8 == pytest.approx((4 + 2 + 8 / 256) * of_rank, rel=1e-3)
    assert paged == pytest.approx((4 + 8 / 256) * of_rank, rel=1e-3)


def test_what_each_key_is_estimated_as():
    plan = PLANS["zero2"]

    def setup(**values):
        return setup_of(MODEL, workload(**values), plan, HARDWARE)

    assert setup().key.loss is Loss.PLAIN
    assert setup(chunked_loss=True).key.loss is Loss.RECOMPUTED
    assert setup(optimizer="adamw_8bit").optimizer is Optimizer.ADAMW_8BIT
    everything = setup(liger=tuple(LigerKernel)).key
    assert everything.loss is Loss.FUSED_LINEAR and everything.fused_kernels
    some = setup(liger=("rope", "rms_norm")).key
    assert some.loss is Loss.PLAIN and not some.fused_kernels
    adapted = setup(adapter=ADAPTER.model_copy(update={"base_storage": "nf4", "rslora": True}))
    assert adapted.key == setup(adapter=ADAPTER).key
    assert plan.recompute is Recompute.NONE


def test_what_has_no_term_is_said():
    assert unestimated(workload(liger=tuple(LigerKernel), chunked_loss=False)) == []
    asked = workload(liger=(LigerKernel.ROPE,), activation_offloading=True)
    assert unestimated(asked) == ["Liger's rope", "activation offloading"]
    assert "memory estimated without Liger's rope and activation off" in describe_workload(asked)
