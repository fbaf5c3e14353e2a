from dataclasses import replace

import pytest

from autotune.memory import (
    Verdict,
    estimate_memory,
    estimate_memory_table,
    fit_probability,
    verdict,
)
from autotune.memory.activations import count_activations
from autotune.memory.closed_form import closed_form_profile
from autotune.memory.columns import PlanColumns
from autotune.memory.setup import setup_of
from autotune.plan import CpBackend, Recompute
from autotune.planner import make_plan
from autotune.spec.hardware import load_hardware
from autotune.spec.model import load_model, model_from_config
from autotune.spec.strategy import load_strategies
from autotune.spec.workload import Precision, Workload
from autotune.units import GIB, MIB

MODEL = load_model("qwen3-8b")
WORKLOAD = Workload(seq_len=4096, packing=False)
HARDWARE = load_hardware("h100-sxm", 8)
STRATEGIES = {s.name: s for s in load_strategies()}


def plan(name, **values):
    values = {"grad_accum_steps": 1} | values
    cp = values.pop("cp", 1)
    recompute = values.pop("recompute", Recompute.NONE)
    return replace(make_plan(STRATEGIES[name], HARDWARE, cp=cp, recompute=recompute), **values)


def estimate(name, workload=WORKLOAD, model=MODEL, hardware=HARDWARE, **values):
    made = plan(name, **values)
    # The closed form: what the model's code says is for the tests of the trace.
    profile = closed_form_profile(model, setup_of(model, workload, made, hardware).key)
    return estimate_memory(model, workload, made, hardware, profile=profile)


def test_a_qwen3_8b_layer_saves_841_mib():
    # What saved_tensors_hooks count on the real model: batch 1, sequence 4096, bf16, causal kernel.
    layer = count_activations(MODEL, WORKLOAD, plan("zero2")).layer
    assert layer / MIB == pytest.approx(841, abs=1)


def test_packing_adds_masks_and_repeated_heads():
    packed = WORKLOAD.model_copy(update={"packing": True})
    plain_layer = count_activations(MODEL, WORKLOAD, plan("zero2")).layer
    packed_layer = count_activations(MODEL, packed, plan("zero2"))
    repeated = 4096 * 2 * 2 * (MODEL.query_size - MODEL.kv_size)
    assert packed_layer.layer - plain_layer == 2 * 4096**2 + repeated
    assert packed_layer.mask == 4096**2


def test_recompute_keeps_inputs_alone():
    activations = count_activations(MODEL, WORKLOAD, plan("zero2"))
    everything = activations.kept(36, Recompute.NONE)
    inputs = activations.kept(36, Recompute.FULL)
    assert everything > 36 * activations.layer
    assert inputs - activations.head == 36 * 4096 * 4096 * 2


def test_sequence_parallel_divides_what_tokens_cost():
    one = count_activations(MODEL, WORKLOAD, plan("zero3"))
    two = count_activations(MODEL, WORKLOAD, plan("zero3", cp=2))
    assert two.logits_loss == one.logits_loss // 2
    # The exchanged attention output is one copy more.
    assert two.layer == (one.layer + 4096 * 2 * MODEL.query_size) // 2


def test_a_ring_keeps_no_mask_and_plain_no_copy():
    packed = WORKLOAD.model_copy(update={"packing": True})
    ring = plan("zero3", cp=2, cp_backend=CpBackend.RING)
    one = count_activations(MODEL, WORKLOAD, plan("zero3")).layer
    assert count_activations(MODEL, WORKLOAD, ring).layer == one // 2
    # Packed sequences are stacked again, and their documents are lengths.
    several = count_activations(MODEL, packed, ring)
    assert several.layer == (one + 4096 * 2 * MODEL.query_size) // 2
    assert several.mask == 0


def test_what_travels_in_a_ring_counts():
    """Only where it is more than the FFN's gradients, which are gone by then."""
    long = WORKLOAD.model_copy(update={"seq_len": 65536, "packing": True})
    few, many = (
        count_activations(
            MODEL, long, plan("zero3", cp=8, cp_backend=CpBackend.RING, heads_k_stride=stride)
        ).layer_gradients
        for stride in (1, 8)
    )
    tokens, buffers = 65536 / 8, 6 * 65536 * 8 * MODEL.head_dim
    assert many == 2 * (tokens * (MODEL.query_size + 2 * MODEL.kv_size) + buffers)
    ffn = count_activations(MODEL, long, plan("zero3", cp=8)).layer_gradients
    assert few == ffn < many


@pytest.mark.parametrize("stride", [1, 2, 4, 8])
def test_a_ring_has_a_closed_form_at_every_stride(stride):
    """Of what lies highest in a layer's backward, the FFN or the ring, one is it at every size."""
    packed = WORKLOAD.model_copy(update={"packing": True})
    for cp in (2, 4, 8):
        ring = plan("zero3", cp=cp, cp_backend=CpBackend.RING, heads_k_stride=stride)
        key = setup_of(MODEL, packed, ring, HARDWARE).key
        assert key.gathered == (cp, stride)
        assert closed_form_profile(MODEL, key).source == "closed form"
        tiny = load_model("tiny-qwen3")
        assert closed_form_profile(tiny, key).source == "closed form"


def test_degrees_of_a_ring_are_groups_of_their_own():
    ring = plan("zero3", cp=2, cp_backend=CpBackend.RING)
    plans = [ring, replace(ring, cp=4), replace(ring, cp=4, micro_batch_size=2), plan("zero3")]
    plans += [plan("zero3", cp=2), plan("zero3", cp=4)]
    groups = [sorted(index.tolist()) for _, index in PlanColumns.of(plans).groups()]
    assert sorted(groups) == [[0], [1], [2], [3], [4, 5]]
    hardware = replace(HARDWARE)
    found = estimate_memory_table(MODEL, WORKLOAD, plans, hardware)
    for position, one in enumerate(plans):
        alone = estimate_memory_table(MODEL, WORKLOAD, [one], hardware)
        assert found.total_bytes[position] == alone.total_bytes[0]


@pytest.mark.parametrize("name", STRATEGIES)
def test_totals(name):
    one = estimate(name, grad_accum_steps=4)
    assert one.total_bytes == max(one.instants.values()) == one.instants[one.peak_instant]
    low, high = one.interval_bytes
    assert low < one.total_bytes < high
    assert min(one.components.values()) >= 0
    assert one.allocator_bytes < one.total_bytes
    assert estimate(name, micro_batch_size=2, grad_accum_steps=4).total_bytes > one.total_bytes
    fewer = estimate(name, grad_accum_steps=1).total_bytes
    assert fewer <= one.total_bytes


def test_fp32_needs_more_than_bf16():
    fp32 = WORKLOAD.model_copy(update={"precision": Precision.FP32})
    for name in ("zero2", "zero3", "fsdp2"):
        assert estimate(name, fp32).total_bytes > estimate(name).total_bytes


def test_logits_peak_is_twelve_bytes():
    activations = count_activations(MODEL, WORKLOAD, plan("zero2"))
    assert activations.logits_loss == 12 * 4096 * MODEL.vocab_size
    assert activations.logits_forward == 10 * 4096 * MODEL.vocab_size


def test_offload_saves_nothing_where_the_device_is_the_host():
    cpu = load_hardware("cpu", 8)
    tiny = load_model("tiny-qwen3")
    moved = estimate("zero2_offload_optimizer", model=tiny, hardware=cpu)
    assert moved.host_bytes == 0 and moved.components["offloaded"] > 0
    assert moved.components["framework"] == 0 and moved.components["allocator"] > 0


def test_verdict_follows_the_probability():
    memory = estimate("zero3")
    at = {
        factor: fit_probability(
            memory,
            replace(
                HARDWARE,
                gpu=replace(HARDWARE.gpu, memory_bytes=int(memory.total_bytes * factor)),
            ),
        )
        for factor in (0.5, 1.0, 2.0)
    }
    assert at[1.0] == pytest.approx(0.5, abs=1e-6)
    assert [verdict(at[f]) for f in (0.5, 1.0, 2.0)] == [
        Verdict.OOM, Verdict.AT_RISK, Verdict.FITS,
    ]  # fmt: skip


def test_host_memory_decides_too():
    memory = estimate("zero3_offload_params")
    assert verdict(fit_probability(memory, HARDWARE)) is Verdict.FITS
    poor = replace(HARDWARE, host_memory_bytes=4 * GIB)
    assert verdict(fit_probability(memory, poor)) is Verdict.OOM


def saved(name, workload, **changes):
    model = load_model(name)
    if changes:
        model = model_from_config("x", model.hf_config | changes)
    return count_activations(model, workload, plan("zero2"))


def test_experts_save_by_assignments():
    two = saved("mixtral-8x7b", WORKLOAD).layer
    three = saved("mixtral-8x7b", WORKLOAD, num_experts_per_tok=3).layer
    # Gate, activation, up, product; gathered input, output; four indices.
    assert three - two == 4096 * (2 * (4 * 14336 + 2 * 4096) + 4 * 8)
    more = saved("mixtral-8x7b", WORKLOAD, num_local_experts=16).layer
    assert more - two == 4096 * 8 * 4  # the router's probabilities alone


def test_windows_cost_a_mask_only_where_they_are_shorter():
    plain = saved("mistral-7b-v0.1", WORKLOAD)
    assert plain.mask == 0  # 4096 tokens, a window of 4096
    windowed = saved("mistral-7b-v0.1", WORKLOAD, sliding_window=512)
    assert windowed.mask == 4096**2
    assert windowed.layer - plain.layer == 2 * 4096**2 + 4096 * 2 * 2 * (4096 - 1024)
    mixed = saved("gemma-3-1b", WORKLOAD)
    full, half = saved("gemma-3-1b", WORKLOAD, sliding_window=4096), 22 / 26
    assert mixed.layers - full.layers == round(half * 26 * (mixed.layer - full.layer))
