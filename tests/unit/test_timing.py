from dataclasses import replace

import pytest

from autotune.memory import estimate_memory_table
from autotune.memory.knowledge import model_key
from autotune.memory.residuals import Residuals, Ruler
from autotune.memory.table import numbers_of
from autotune.memory.verdict import judge_table
from autotune.plan import CpBackend, Recompute
from autotune.planner import best_first_index, enumerate_plans, make_plan, rank_plans
from autotune.rules import check_plan
from autotune.spec.hardware import load_hardware
from autotune.spec.model import load_model, model_from_config
from autotune.spec.strategy import load_strategies
from autotune.spec.workload import Lora, Workload
from autotune.timing import ColdStart, collective_s, estimate_time, estimate_time_table
from autotune.timing.compute import compute_of
from autotune.timing.flops import attention_flops_per_token
from autotune.timing.links import Links
from autotune.timing.traffic import traffic_of

MODEL = load_model("qwen3-8b")
WORKLOAD = Workload(seq_len=4096, global_batch_size=64, packing=False)
H100 = load_hardware("h100-sxm", 8)
NODES = load_hardware("h100-sxm", 32)
STRATEGIES = {s.name: s for s in load_strategies()}


def estimate(
    name, workload=WORKLOAD, hardware=H100, cp=1, micro=1, recompute=Recompute.NONE, model=MODEL
):
    plan = make_plan(STRATEGIES[name], hardware, cp=cp, recompute=recompute)
    per_rank = workload.global_batch_size // plan.data_parallel_size
    plan = replace(plan, micro_batch_size=micro, grad_accum_steps=per_rank // micro)
    return estimate_time(model, workload, plan, hardware)


@pytest.mark.parametrize("name", STRATEGIES)
def test_parts_add_up(name):
    time = estimate(name)
    assert time.step_s == pytest.approx(sum(time.components.values()))
    assert min(time.components.values()) >= 0
    assert time.tokens_per_s == pytest.approx(4096 * 64 / time.step_s)
    assert 0 < time.mfu < 0.75  # the assumed efficiency of matrix products


def test_only_ranks_that_share_states_share_the_step():
    """Ranks that share a sequence share the states, but not under DDP."""
    ddp, ulysses = (estimate("ddp", cp=cp).components["optimizer_s"] for cp in (1, 2))
    assert ulysses == ddp
    zero2, ulysses = (estimate("zero2", cp=cp).components["optimizer_s"] for cp in (1, 2))
    assert ulysses == zero2 == pytest.approx(ddp / 8)


def test_model_flops_are_six_a_weight_plus_attention():
    flops = estimate("zero2").model_flops_per_step / (4096 * 64)
    weights = 6 * (MODEL.num_parameters - MODEL.num_embedding_parameters)
    attention = 6 * MODEL.num_layers * MODEL.query_size * 4096  # causal half of PaLM's 12
    assert flops == pytest.approx(weights + attention, rel=1e-3)


def test_fp8_shortens_the_projections_alone():
    """By less than half, for the casts; attention, head and loss stay, and a CPU emulates."""
    fp8 = WORKLOAD.model_copy(update={"fp8": True})
    plain, cast = estimate("fsdp2"), estimate("fsdp2", fp8)
    weights = MODEL.num_layers * sum(a * b for a, b in MODEL.linears.values())
    tokens = 4096 * 64 / 8
    projections = 6 * weights * tokens / (H100.gpu.peak_flops[WORKLOAD.precision] * 0.75)
    saved = plain.compute_s - cast.compute_s
    assert 0.1 * projections < saved < 0.5 * projections
    assert cast.model_flops_per_step == plain.model_flops_per_step
    ranks = load_hardware("cpu", 8)
    assert estimate("fsdp2", fp8, ranks).step_s == estimate("fsdp2", hardware=ranks).step_s


def test_recompute_costs_a_forward_of_the_layers():
    none, full = estimate("zero2"), estimate("zero2", recompute=Recompute.FULL)
    assert none.recompute_s == 0
    assert 0.2 < full.recompute_s / none.compute_s < 1 / 3
    assert full.mfu < none.mfu


def test_accumulation_multiplies_zero3_and_not_ddp():
    def total(name, micro):
        time = estimate(name, hardware=NODES, micro=micro)
        return time.communication_s + time.hidden_communication_s

    assert total("zero3", 1) == pytest.approx(2 * total("zero3", 2), rel=0.01)
    assert total("ddp", 1) == pytest.approx(total("ddp", 2))
    # FSDP2 gathers each micro-step and reduces once, ZeRO-3 reduces each time.
    assert total("fsdp2", 1) < total("zero3", 1)
    assert total("fsdp2_no_reshard", 1) < total("fsdp2", 1)


def test_hybrid_shards_keep_gathers_off_the_network():
    slow = replace(NODES, inter_node=replace(NODES.inter_node, bytes_per_s=5e9))
    hybrid, full = estimate("hsdp", hardware=slow), estimate("fsdp2", hardware=slow)
    assert hybrid.communication_s < full.communication_s


def test_ring_formula():
    nbytes, link = 8e9, H100.intra_node
    ideal = nbytes * 7 / 8 / (link.bytes_per_s * 0.75)
    one = collective_s(nbytes, 8, 1, H100, 1)
    assert one == pytest.approx(ideal + 8.4e-6 + 7 * link.alpha_s)
    assert collective_s(nbytes, 8, 1, H100, 10) > one
    assert collective_s(nbytes, 1, 1, H100, 10) == 0


def test_a_group_over_nodes_has_a_network_card_for_each_member_in_a_node():
    nbytes = 8e9
    nic = NODES.inter_node.bytes_per_s * 0.75
    whole = collective_s(nbytes, 32, 1, NODES, 1)
    one_each = collective_s(nbytes, 4, 8, NODES, 1)
    assert whole == pytest.approx(nbytes * 31 / 32 / (8 * nic), rel=0.01)
    assert one_each == pytest.approx(nbytes * 3 / 4 / nic, rel=0.01)


def test_offload_pays_for_the_host():
    near, far = estimate("zero2"), estimate("zero2_offload_optimizer")
    assert far.optimizer_s > 5 * near.optimizer_s
    assert far.offload_s > 0 == near.offload_s


def test_sequence_parallel_pays_for_its_exchange():
    assert estimate("zero3", cp=2).communication_s > estimate("zero3").communication_s


def test_lora_skips_the_weight_gradients():
    lora = WORKLOAD.model_copy(update={"adapter": Lora()})
    ratio = estimate("zero2", lora).compute_s / estimate("zero2").compute_s
    assert 2 / 3 < ratio < 0.9


def test_masked_attention_is_slower():
    packed = WORKLOAD.model_copy(update={"packing": True})
    assert estimate("zero2", packed).compute_s > 1.1 * estimate("zero2").compute_s


def test_short_sequences_wait_for_the_host():
    short = Workload(seq_len=64, global_batch_size=64, packing=False)
    alone = load_hardware("h100-sxm", 1)
    assert estimate("zero1", short, alone).launch_s > 0
    assert estimate("zero1", hardware=alone).launch_s == 0


def test_nothing_overlaps_on_cpu_ranks():
    cpu = load_hardware("cpu", 8)
    time = estimate("zero3", hardware=cpu)
    assert time.hidden_communication_s == 0


def moved(name, micro_steps, bytes_per_parameter):
    """Seconds of one rank's traffic in plain bandwidth terms, 8 ranks on NVLink."""
    estimate_of = estimate(name, micro=8 // micro_steps)
    total = estimate_of.communication_s + estimate_of.hidden_communication_s
    volume = bytes_per_parameter * MODEL.num_parameters * 7 / 8
    return total, volume / (H100.intra_node.bytes_per_s * 0.75)


# Bytes a parameter and step for m = 4 micro-steps: docs/formulas.md, "Volumes a step".
@pytest.mark.parametrize(
    ("name", "bytes_per_parameter"),
    [
        ("ddp", 8),
        ("zero1", 8 + 2),
        ("zero2", 4 * 8 + 2),
        ("zero3", 4 * (2 + 2 * (1 - 5e8 / MODEL.num_parameters) + 4)),
        ("fsdp2", 4 * (2 + 2) + 4),
        ("fsdp2_no_reshard", 4 * 2 + 4),
    ],
)
def test_volumes(name, bytes_per_parameter):
    total, expected = moved(name, 4, bytes_per_parameter)
    assert expected < total < 1.5 * expected  # the rest is latency


def test_copies_are_reduced_over_the_network():
    slow = replace(NODES, inter_node=replace(NODES.inter_node, bytes_per_s=1e9))
    # 8 shards, 4 copies: an all-reduce of a shard's fp32 gradients over one card each.
    expected = 2 * 4 * MODEL.num_parameters / 8 * 3 / 4 / (1e9 * 0.75)
    time = estimate("hsdp", hardware=slow)
    assert time.communication_s + time.hidden_communication_s > expected
    assert time.communication_s < 1.1 * expected


def test_recompute_repeats_the_sequence_exchange():
    none = estimate("zero1", cp=2)
    full = estimate("zero1", cp=2, recompute=Recompute.FULL)
    exchange = none.communication_s - estimate("zero1").communication_s
    assert full.communication_s - none.communication_s > 0.3 * exchange


def ring_plan(name, *, cp, **values):
    return replace(make_plan(STRATEGIES[name], H100, cp=cp), micro_batch_size=1, **values)


def ring_seconds(packing, **values):
    workload = WORKLOAD.model_copy(update={"packing": packing})
    plan = ring_plan("zero1", cp=2, cp_backend=CpBackend.RING, **values)
    links = Links(hardware=H100)
    return traffic_of(MODEL, workload, plan, numbers_of(plan), links).blocking[0]


def test_a_ring_sends_its_keys_and_values_around():
    """docs/formulas.md: keys and values one hop in each pass, their fp32 gradients two."""
    tokens, link = WORKLOAD.seq_len / 2, H100.intra_node.bytes_per_s * 0.75
    hop = 2 * tokens * MODEL.kv_size
    volume = MODEL.num_layers * hop * (2 + 2 + 2 * 4) / link
    assert volume < ring_seconds(False) < volume + MODEL.num_layers * 8 * 5e-5
    again = ring_seconds(False, recompute=Recompute.FULL) - ring_seconds(False)
    assert again > MODEL.num_layers * hop * 2 / link


def test_a_packed_ring_gathers_fewer_times_at_a_larger_stride():
    tokens, link = WORKLOAD.seq_len, H100.intra_node.bytes_per_s * 0.75
    whole = 2 * tokens * MODEL.kv_size * 2  # bytes
    volume = MODEL.num_layers * whole * 3 * (1 / 2) / link  # forward, backward, gradients
    one, all_heads = ring_seconds(True), ring_seconds(True, heads_k_stride=MODEL.num_kv_heads)
    assert volume < all_heads < one


def test_the_last_rank_of_a_ring_attends_to_most():
    def compute(backend, packing):
        workload = WORKLOAD.model_copy(update={"packing": packing})
        plan = ring_plan("zero1", cp=4, cp_backend=backend)
        return compute_of(MODEL, workload, plan, numbers_of(plan), H100, None).forward[0]

    attention = attention_flops_per_token(MODEL, WORKLOAD)[0] * WORKLOAD.seq_len / 4
    more = 0.75 * attention / (H100.gpu.peak_flops[WORKLOAD.precision] * 0.35)
    plain = compute(CpBackend.RING, False) - compute(CpBackend.ULYSSES, False)
    assert plain == pytest.approx(more, rel=0.1)  # its output is a copy less
    # Documents by their lengths instead of a mask.
    assert compute(CpBackend.RING, True) < compute(CpBackend.ULYSSES, True)


def test_parameters_in_host_memory_come_up_twice_a_micro_step():
    optimizer, both = estimate("zero3_offload_optimizer"), estimate("zero3_offload_params")
    shard = 2 * MODEL.num_parameters / 8
    ups = 2 * 8 * shard / (H100.gpu.host_link.bytes_per_s * 0.75)
    assert both.offload_s - optimizer.offload_s == pytest.approx(ups)


def changed(name, **changes):
    return model_from_config("x", load_model(name).hf_config | changes)


def test_experts_cost_what_their_tokens_compute():
    two, four = (changed("mixtral-8x7b", num_experts_per_tok=n) for n in (2, 4))
    sixteen = changed("mixtral-8x7b", num_local_experts=16)
    flops = [
        estimate("zero3", model=m).model_flops_per_step / (4096 * 64) for m in (two, four, sixteen)
    ]
    assert flops[1] - flops[0] == pytest.approx(6 * 32 * 2 * 3 * 4096 * 14336)
    assert flops[2] - flops[0] == pytest.approx(6 * 32 * 8 * 4096)  # the router's
    assert estimate("zero3", model=four).compute_s > 1.3 * estimate("zero3", model=two).compute_s
    # 16 experts have the FLOPs of 8, and twice the parameters to gather.
    assert (
        estimate("zero3", model=sixteen).compute_s < 1.05 * estimate("zero3", model=two).compute_s
    )


def test_few_tokens_still_read_the_weights_of_all_their_experts():
    short = WORKLOAD.model_copy(update={"seq_len": 64})
    few, many = (changed("mixtral-8x7b", num_local_experts=n) for n in (2, 16))
    assert (
        estimate("zero3", short, model=many).compute_s
        > 3 * estimate("zero3", short, model=few).compute_s
    )


def test_a_window_saves_useful_flops_but_no_time():
    full, half = (changed("mistral-7b-v0.1", sliding_window=w) for w in (4096, 1024))
    one, other = estimate("zero2", model=full), estimate("zero2", model=half)
    keys = 1024 - 1024**2 / (2 * 4096)
    lost = 3 * 4 * 32 * 4096 * (2048 - keys) * 4096 * 64
    assert one.model_flops_per_step - other.model_flops_per_step == pytest.approx(lost)
    assert other.compute_s > one.compute_s  # the masked kernel computes the whole square


def plans_of(model, workload, hardware):
    plans = enumerate_plans(model, workload, hardware, list(STRATEGIES.values()))
    return [plan for plan in plans if not check_plan(plan, model, workload, hardware)]


@pytest.mark.parametrize(
    ("name", "hardware", "adapter"),
    [
        ("mixtral-8x7b", NODES, None),
        ("qwen3-8b", NODES, Lora()),
        ("tiny-qwen3", load_hardware("cpu", 4), None),
    ],
)
def test_a_table_says_what_single_plans_do(name, hardware, adapter):
    model, workload = load_model(name), Workload(seq_len=512, adapter=adapter)
    plans = plans_of(model, workload, hardware)
    table = estimate_time_table(model, workload, plans, hardware)
    assert len(plans) > 40
    for position in range(0, len(plans), 3):
        single = estimate_time(model, workload, plans[position], hardware)
        row = table.estimate(position)
        assert row.components == pytest.approx(single.components)
        assert row.hidden_communication_s == pytest.approx(single.hidden_communication_s)
        assert table.step_s[position] == pytest.approx(single.step_s)
        assert (row.num_ranks, row.mfu) == (single.num_ranks, pytest.approx(single.mfu))


def test_a_cold_start_is_spread_over_the_run():
    plan = make_plan(STRATEGIES["ddp"], H100, grad_accum_steps=8)
    plain = estimate_time(MODEL, WORKLOAD, plan, H100)
    spread = ColdStart(seconds=120.0, run_steps=1000)
    compiled = estimate_time(MODEL, WORKLOAD, plan, H100, cold_start=spread)
    assert plain.overhead_s == 0
    assert compiled.step_s - plain.step_s == pytest.approx(0.12)


def test_hidden_communication_slows_what_hides_it():
    slow = replace(H100, intra_node=replace(H100.intra_node, bytes_per_s=100e9))
    fast, other = estimate("fsdp2"), estimate("fsdp2", hardware=slow)
    assert fast.compute_s == other.compute_s
    assert other.hidden_communication_s > fast.hidden_communication_s > 0
    assert other.step_s > fast.step_s


def test_arrays_are_ordered_as_objects_are():
    ranking = rank_plans(MODEL, WORKLOAD, H100, list(STRATEGIES.values()))
    plans = [e.plan for e in ranking.candidates][::-1]
    memory = estimate_memory_table(MODEL, WORKLOAD, plans, H100)
    judged = judge_table(memory, H100, Residuals.known(Ruler.CUDA), model_key(MODEL))
    times = estimate_time_table(MODEL, WORKLOAD, plans, H100)
    order = best_first_index(judged, times)
    expected = [e.time.step_s for e in ranking.candidates]
    assert [times.step_s[i] for i in order] == pytest.approx(expected)
    assert expected != sorted(expected)  # what does not fit comes last, however fast
