from dataclasses import replace

import pytest

from autotune.memory import Verdict, estimate_memory, fit_probability, verdict
from autotune.memory.activations import count_activations
from autotune.memory.states import model_states
from autotune.plan import Engine, Plan, Recompute
from autotune.planner import make_plan
from autotune.spec.hardware import load_hardware
from autotune.spec.model import load_model, model_from_config
from autotune.spec.strategy import load_strategies
from autotune.spec.workload import Lora, Precision, Workload
from autotune.units import GIB, MIB

MODEL = load_model("qwen3-8b")
P = MODEL.num_parameters
WORKLOAD = Workload(seq_len=4096, packing=False)
HARDWARE = load_hardware("h100-sxm", 8)
STRATEGIES = {s.name: s for s in load_strategies()}


def plan(name, **values):
    values = {"grad_accum_steps": 1} | values
    cp = values.pop("cp", 1)
    recompute = values.pop("recompute", Recompute.NONE)
    return replace(make_plan(STRATEGIES[name], HARDWARE, cp=cp, recompute=recompute), **values)


def estimate(name, workload=WORKLOAD, model=MODEL, hardware=HARDWARE, **values):
    return estimate_memory(model, workload, plan(name, **values), hardware)


def states(name, workload=WORKLOAD, **values):
    return model_states(MODEL, workload, plan(name, **values), HARDWARE)


# Bytes a parameter of parameters + optimizer (+ master) + gradients at the step, 8 ranks; ZeRO
# (arXiv:1910.02054) with the fp32 gradients of the numerics contract.
@pytest.mark.parametrize(
    ("name", "bytes_per_parameter"),
    [
        ("ddp", 4 + 8 + 4),
        ("zero1", 2 + 12 / 8 + 4),
        ("zero2", 2 + 16 / 8),
        ("zero3", 18 / 8),
        ("fsdp2", 16 / 8),
        ("fsdp2_no_reshard", 16 / 8),
        ("hsdp", 16 / 4),
        ("zero2_offload_optimizer", 2),
        ("zero3_offload_optimizer", 2 / 8),
        ("zero3_offload_params", 0),
        ("fsdp2_offload", 0),
    ],
)
def test_model_states(name, bytes_per_parameter):
    s = states(name)
    total = s.parameters + s.optimizer + s.gradients_step
    assert total == pytest.approx(bytes_per_parameter * P, rel=1e-6, abs=64)


@pytest.mark.parametrize(
    ("name", "accumulation", "bytes_per_parameter"),
    [
        ("zero2_offload_optimizer", 1, 16),
        ("zero2_offload_optimizer", 2, 20),
        ("zero3_offload_params", 1, 18),
        ("fsdp2_offload", 1, 16),
        ("zero3", 1, 0),
    ],
)
def test_host_memory(name, accumulation, bytes_per_parameter):
    host = states(name, grad_accum_steps=accumulation).host
    assert host * 8 == pytest.approx(bytes_per_parameter * P, rel=1e-6, abs=512)


def test_accumulation_without_sync_holds_whole_gradients_on_fsdp2():
    assert states("fsdp2", grad_accum_steps=2).gradients_later == 4 * P
    assert states("fsdp2", grad_accum_steps=1).gradients_later == 0
    assert states("zero2", grad_accum_steps=2).gradients_later == pytest.approx(4 * P / 8, rel=1e-6)


def test_keeping_gathered_parameters_costs_two_bytes_each():
    more = states("fsdp2_no_reshard").gathered_backward - states("fsdp2").gathered_backward
    others = MODEL.num_layers - 1
    assert more == 2 * others * MODEL.num_parameters_per_layer


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
    none, full = estimate("zero2"), estimate("zero2", recompute=Recompute.FULL)
    assert none.instants["loss"] - full.instants["loss"] == everything - inputs
    # Backward holds one layer in full beside the inputs.
    saved = none.instants["backward"] - full.instants["backward"]
    assert saved == everything - inputs - activations.layer


def test_sequence_parallel_divides_what_tokens_cost():
    one = count_activations(MODEL, WORKLOAD, plan("zero3"))
    two = count_activations(MODEL, WORKLOAD, plan("zero3", cp=2))
    assert two.logits_loss == one.logits_loss // 2
    # The exchanged attention output is one copy more.
    assert two.layer == (one.layer + 4096 * 2 * MODEL.query_size) // 2


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


def test_lora_trains_little():
    workload = WORKLOAD.model_copy(update={"adapter": Lora(r=16)})
    added = MODEL.num_adapter_parameters(workload.adapter)
    s = states("zero2", workload)
    assert s.parameters == 2 * (P + added)
    assert s.optimizer == pytest.approx(12 * added / 8, rel=1e-6)
    assert estimate("zero2", workload).total_bytes < estimate("zero2").total_bytes


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


def test_bucket_size_counts():
    small = estimate("zero2", bucket_elements=1_000_000)
    large = estimate("zero2", bucket_elements=500_000_000)
    assert large.components["buckets"] - small.components["buckets"] == 2 * 4 * 499_000_000


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


def test_ddp_world_one_has_no_buckets():
    one = load_hardware("h100-sxm", 1)
    alone = Plan(strategy="ddp", engine=Engine.DDP)
    assert model_states(MODEL, WORKLOAD, alone, one).buckets == 0
    assert states("ddp").buckets == 4 * P


# Temporaries, in bytes a parameter of what they are counted on; docs/formulas.md.
def test_step_temporaries():
    shard = P / 8
    assert states("zero1").step_work == pytest.approx(8 * shard, rel=1e-6)
    assert states("zero2").step_work == pytest.approx(8 * shard, rel=1e-6)
    assert states("zero3").step_work == 8 * 1_000_000_000  # one sub-group
    assert states("fsdp2").step_work == states("zero2_offload_optimizer").step_work == 0


def test_zero3_gathers_a_window():
    bucket = MODEL.hidden_size**2
    window = MODEL.num_embedding_parameters + bucket + 500_000_000
    assert states("zero3").gathered_backward == 2 * window
    tiny = load_model("tiny-qwen3")
    small = model_states(tiny, WORKLOAD, plan("zero3"), HARDWARE)
    assert small.gathered_backward == 2 * tiny.num_parameters


def test_gradients_at_work():
    head, root = MODEL.num_embedding_parameters, MODEL.num_root_parameters
    fsdp, zero = states("fsdp2"), states("zero2")
    assert fsdp.layer_gradient_work == 6 * MODEL.num_parameters_per_layer + 2 * head
    assert fsdp.end_gradient_work == 6 * root
    assert zero.head_gradient_work == zero.end_gradient_work == 6 * head
    assert states("ddp").layer_gradient_work == 6 * MODEL.num_parameters_per_layer


@pytest.mark.parametrize("name", STRATEGIES)
def test_instants_hold_what_works_there(name):
    s = states(name)
    instants = estimate(name).instants
    activations = count_activations(MODEL, WORKLOAD, plan(name))
    fixed = s.parameters + s.optimizer + s.buckets + estimate(name).components["framework"]
    kept = activations.kept(36, Recompute.NONE)
    assert instants["backward"] == (
        fixed + s.gradients_first + s.layer_gradient_work + s.gathered_backward + s.cast_cache
        + kept + activations.layer_gradients
    )  # fmt: skip
    assert instants["backward_end"] == (
        fixed + s.gradients_step + s.end_gradient_work + s.gathered_end
    )
    assert instants["optimizer_step"] == fixed + s.gradients_step + s.step_work


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


def test_stacked_experts_are_the_largest_module_and_parameter():
    workload = Workload(seq_len=2048, packing=False)
    model, zero3 = load_model("gpt-oss-120b"), plan("zero3")
    states = model_states(model, workload, zero3, HARDWARE)
    gathered = 128 * (3 * 2880**2 + 3 * 2880) + 2880**2 + 500_000_000
    assert states.gathered_forward == 2 * gathered
    assert states.layer_gradient_work == 6 * 128 * 2 * 2880**2
