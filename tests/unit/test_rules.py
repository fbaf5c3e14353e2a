import re
from dataclasses import replace
from pathlib import Path

import pytest

from autotune.config.combinations import FILE_RULES
from autotune.plan import CpBackend, Engine, Plan, Recompute
from autotune.rules import check_plan, check_strategy, rule_codes
from autotune.spec.hardware import load_hardware
from autotune.spec.model import load_model
from autotune.spec.strategy import Strategy
from autotune.spec.workload import LigerKernel, Lora, Precision, Workload

MODEL = load_model("tiny-qwen3")  # 8 heads, 4 key-value heads
WORKLOAD = Workload(seq_len=1024, global_batch_size=16)
HARDWARE = load_hardware("h100-sxm", 4)
CPU = load_hardware("cpu", 4)
ZERO = Plan(strategy="zero2", engine=Engine.DEEPSPEED, zero_stage=2, dp_shard=4, grad_accum_steps=4)
FSDP = Plan(strategy="fsdp2", engine=Engine.FSDP2, dp_shard=4, grad_accum_steps=4)
DDP = Plan(strategy="ddp", engine=Engine.DDP, dp_replicate=4, grad_accum_steps=4)
RING = replace(ZERO, dp_shard=2, cp=2, grad_accum_steps=8, cp_backend=CpBackend.RING)


def lora(**values):
    return WORKLOAD.model_copy(update={"adapter": Lora(**values)})


def changed(**values):
    return WORKLOAD.model_copy(update=values)


def batch(size):
    return WORKLOAD.model_copy(update={"global_batch_size": size})


# Where the model itself breaks the rule.
MODELS = {
    "AT120": MODEL.model_copy(update={"hf_config": {"output_router_logits": True}}),
    "AT121": MODEL.model_copy(update={"hf_config": {"resid_pdrop": 0.1, "attention_dropout": 0.0}}),
    "AT136": MODEL.model_copy(update={"hf_config": {"model_type": "gpt2"}}),
    "AT143": MODEL.model_copy(update={"hidden_size": 136}),
}
ON_CPU = ("AT134", "AT135", "AT138")
A100 = load_hardware("a100-80gb", 4)

# code: plan, workload, and what the message or hint must say.
EXAMPLES = {
    "AT101": (replace(ZERO, dp_shard=2), WORKLOAD, "1 x 2 x 1 x 1 makes 2 ranks"),
    "AT102": (replace(ZERO, cp=3), WORKLOAD, "Degrees that do: 1, 2, 4"),
    "AT103": (ZERO, batch(18), "Nearest that do: 16 or 20"),
    "AT104": (replace(ZERO, micro_batch_size=3), WORKLOAD, "x grad_accum_steps must be 4"),
    "AT105": (
        replace(ZERO, cp=4, dp_shard=1),
        WORKLOAD.model_copy(update={"seq_len": 1022}),
        "Nearest that do: 1020 or 1024",
    ),
    "AT106": (replace(ZERO, cp=8, dp_shard=1), WORKLOAD, "Degrees that do: 1, 2, 4"),
    "AT107": (replace(FSDP, dp_replicate=4, dp_shard=1), WORKLOAD, "at least 2 copies"),
    "AT108": (replace(FSDP, dp_shard=1, tp=4), WORKLOAD, "shards nothing"),
    "AT109": (replace(ZERO, zero_stage=0), WORKLOAD, "stage 1, 2 or 3"),
    "AT110": (replace(ZERO, offload_params=True), WORKLOAD, "ZeRO-3 alone"),
    "AT111": (replace(DDP, dp_replicate=2, dp_shard=2), WORKLOAD, "neither shards nor"),
    "AT112": (replace(ZERO, dp_replicate=2, dp_shard=2), WORKLOAD, "dp_replicate 2 has no"),
    "AT113": (ZERO, lora(target_modules=("q_proj", "wqkv")), "does not have: wqkv"),
    "AT114": (ZERO, lora(r=200), "smallest side of a target projection, 128"),
    "AT115": (replace(ZERO, tp=2, dp_shard=2), WORKLOAD, "under FSDP2 alone"),
    "AT119": (replace(FSDP, recompute=Recompute.FULL), lora(dropout=0.1), "would drop different"),
    "AT120": (ZERO, WORKLOAD, "Set output_router_logits to false"),
    "AT121": (replace(FSDP, recompute=Recompute.FULL), WORKLOAD, "sets resid_pdrop with FSDP2"),
    "AT122": (replace(RING, heads_k_stride=3), WORKLOAD, "heads_k_stride 3 with 4 key-value heads"),
    "AT130": (
        replace(ZERO, zero_stage=3),
        lora(dora=True, base_storage="nf4"),
        "which DeepSpeed has not sharded",
    ),
    "AT132": (FSDP, changed(optimizer="adamw_8bit"), "hands the optimizer shards"),
    "AT133": (
        replace(ZERO, offload_optimizer=True),
        changed(optimizer="adamw_8bit"),
        "own CPU Adam",
    ),
    "AT134": (DDP, changed(optimizer="paged_adamw_8bit"), "Use adamw_8bit on CPU"),
    "AT135": (DDP, changed(liger=("rope",)), "Liger's rope on CPU ranks"),
    "AT136": (DDP, changed(liger=("rope",)), "model_type gpt2"),
    "AT137": (
        DDP,
        changed(chunked_loss=True, liger=("fused_linear_cross_entropy",)),
        "two ways to compute one loss",
    ),
    "AT138": (
        replace(DDP, recompute=Recompute.FULL),
        changed(activation_offloading=True),
        "already",
    ),
    "AT139": (DDP, changed(activation_offloading=True), "gradient_checkpointing: true besides"),
    "AT140": (DDP, changed(fp8=True), "from compute capability 8.9"),
    "AT141": (DDP, changed(fp8=True, adapter=Lora()), "frozen weights"),
    "AT142": (replace(ZERO, zero_stage=3), changed(fp8=True), "all of them at the end of forward"),
    "AT143": (DDP, changed(fp8=True), "two sides that are multiples of 16"),
    "AT144": (DDP, changed(fp8=True, precision=Precision.FP32), "Use bf16 with fp8"),
    "AT145": (ZERO, changed(fp8=True, fp8_all_gather=True), "with deepspeed: FSDP2 gathers"),
    "AT150": (replace(ZERO, zero_stage=3, hpz=4), WORKLOAD, "Sizes here: 2."),
}


@pytest.mark.parametrize("code", EXAMPLES)
def test_example(code):
    plan, workload, words = EXAMPLES[code]
    model = MODELS.get(code, MODEL)
    hardware = CPU if code in ON_CPU else A100 if code == "AT140" else HARDWARE
    broken = {v.code: v for v in check_plan(plan, model, workload, hardware)}
    assert code in broken
    assert words in str(broken[code])


@pytest.mark.parametrize(
    ("plan", "workload"),
    [
        (ZERO, WORKLOAD),
        (FSDP, WORKLOAD),
        (DDP, WORKLOAD),
        (ZERO, lora()),
        (ZERO, lora(base_storage="nf4_double", dora=True)),
        (replace(ZERO, zero_stage=3), lora(base_storage="nf4_double")),
        (replace(ZERO, zero_stage=3), lora(dora=True)),
        (FSDP, lora(base_storage="nf4", rslora=True)),
        (ZERO, changed(optimizer="paged_adamw_8bit", chunked_loss=True)),
        (FSDP, changed(liger=tuple(LigerKernel))),
        (replace(FSDP, recompute=Recompute.FULL), changed(activation_offloading=True)),
        (replace(ZERO, zero_stage=3, offload_params=True), WORKLOAD),
        (replace(FSDP, offload_params=True, offload_optimizer=True), WORKLOAD),
        (replace(ZERO, zero_stage=3, hpz=2), WORKLOAD),
        (replace(FSDP, dp_replicate=2, dp_shard=2), WORKLOAD),
        (replace(FSDP, dp_shard=1, cp=4, grad_accum_steps=16), WORKLOAD),
        (replace(DDP, dp_replicate=2, cp=2, grad_accum_steps=8), WORKLOAD),
        (RING, WORKLOAD),
        (replace(RING, heads_k_stride=4), WORKLOAD),
        (replace(FSDP, dp_shard=2, tp=2, grad_accum_steps=8), WORKLOAD),
        (DDP, changed(fp8=True)),
        (replace(ZERO, zero_stage=3, recompute=Recompute.FULL), changed(fp8=True)),
        (FSDP, changed(fp8=True, fp8_all_gather=True)),
    ],
)
def test_legal(plan, workload):
    assert check_plan(plan, MODEL, workload, HARDWARE) == []


@pytest.mark.parametrize("plan", [replace(FSDP, dp_shard=1), replace(ZERO, dp_shard=1)])
def test_one_rank_runs_sharding_engines(plan):
    plan = replace(plan, grad_accum_steps=16)
    assert check_plan(plan, MODEL, WORKLOAD, load_hardware("h100", 1)) == []


@pytest.mark.parametrize(
    ("plan", "code"),
    [
        (replace(FSDP, zero_stage=2), "AT109"),
        (replace(FSDP, offload_params=True), "AT110"),
        (replace(FSDP, offload_optimizer=True), "AT110"),
        (replace(DDP, offload_optimizer=True), "AT111"),
        (replace(ZERO, hpz=2), "AT150"),
        (replace(ZERO, zero_stage=3, hpz=3), "AT150"),
        (replace(FSDP, hpz=2), "AT150"),
        (replace(ZERO, zero_stage=3, hpz=2, offload_params=True, offload_optimizer=True), "AT150"),
    ],
)
def test_other_forms(plan, code):
    assert [v.code for v in check_plan(plan, MODEL, WORKLOAD, HARDWARE)] == [code]


def test_what_a_config_may_say():
    quiet = {"output_router_logits": False, "resid_pdrop": 0.0}
    noisy = MODEL.model_copy(update={"hf_config": {"resid_pdrop": 0.1}})
    for model in (MODEL.model_copy(update={"hf_config": quiet}), noisy):
        assert check_plan(ZERO, model, WORKLOAD, HARDWARE) == []


def test_experts_are_no_lora_targets():
    adapter = WORKLOAD.model_copy(update={"adapter": Lora()})
    broken = check_plan(ZERO, load_model("tiny-mixtral"), adapter, HARDWARE)
    assert [v.code for v in broken] == ["AT113"]
    assert "stacked parameters" in broken[0].hint
    assert "stacked" not in check_plan(ZERO, MODEL, lora(target_modules=()), HARDWARE)[0].hint


def test_the_ring_splits_no_heads():
    eight = load_hardware("h100-sxm", 8)
    ulysses = replace(ZERO, dp_shard=1, cp=8, grad_accum_steps=16)
    (refused,) = check_plan(ulysses, MODEL, WORKLOAD, eight)
    assert refused.code == "AT106" and "Ring attention takes any" in refused.hint
    assert check_plan(replace(ulysses, cp_backend=CpBackend.RING), MODEL, WORKLOAD, eight) == []


def test_the_ring_is_no_advice_beside_tensor_parallelism():
    plan = replace(FSDP, dp_shard=1, tp=2, cp=4, grad_accum_steps=16)
    refused = {v.code: v for v in check_plan(plan, MODEL, WORKLOAD, load_hardware("h100-sxm", 8))}
    assert refused["AT106"].hint == "Degrees that do: 1, 2."


@pytest.mark.parametrize(
    ("model", "precision", "words"),
    [
        ({"sliding_window": 512, "num_window_layers": 2}, "bf16", "a sliding window of 512 tokens"),
        ({"sinks": True}, "bf16", "sinks"),
        ({"hf_config": {"attention_dropout": 0.1}}, "bf16", "attention_dropout"),
        ({}, "fp32", "fp32 on GPUs"),
        ({"head_dim": 260}, "bf16", "heads of 260 on GPUs"),
        ({"head_dim": 260, "sinks": True}, "bf16", "sinks nor heads of 260"),
    ],
)
def test_what_the_ring_cannot_do(model, precision, words):
    workload = WORKLOAD.model_copy(update={"precision": Precision(precision)})
    case = MODEL.model_copy(update=model), workload
    (refused,) = check_plan(RING, *case, HARDWARE)
    assert refused.code == "AT122" and words in refused.message
    assert check_plan(replace(RING, cp_backend=CpBackend.ULYSSES), *case, HARDWARE) == []


def test_cpu_ranks_take_any_head_and_fp32_in_a_ring():
    fp32 = WORKLOAD.model_copy(update={"precision": Precision.FP32})
    model = MODEL.model_copy(update={"head_dim": 260})
    assert check_plan(RING, model, fp32, load_hardware("cpu", 4)) == []


def test_where_fp8_is_emulated_it_takes_more():
    """Of CPU ranks no product asks for bf16 or 16 tokens at a time."""
    fp32 = changed(fp8=True, precision=Precision.FP32, seq_len=1023)
    assert check_plan(DDP, MODEL, fp32, CPU) == []
    odd = check_plan(DDP, MODEL, changed(fp8=True, seq_len=1023), HARDWARE)
    assert [v.code for v in odd] == ["AT143"] and "1023 tokens" in str(odd[0])


def test_fp8_is_not_split_nor_gathered_without_itself():
    split = replace(FSDP, dp_shard=2, tp=2, grad_accum_steps=8)
    (refused,) = check_plan(split, MODEL, changed(fp8=True), HARDWARE)
    assert refused.code == "AT115" and "with fp8 is not run" in refused.message
    (refused,) = check_plan(FSDP, MODEL, changed(fp8_all_gather=True), HARDWARE)
    assert refused.code == "AT145" and "without fp8" in refused.message


def test_strategy_support():
    strategy = Strategy(
        name="x", summary="", engine=Engine.DDP,
        supports_sequence_parallel=False, supports_lora=False,
    )  # fmt: skip
    assert [v.code for v in check_strategy(strategy, lora(), 2)] == ["AT116", "AT117"]
    assert check_strategy(strategy, WORKLOAD, 1) == []


def test_every_code_is_documented_and_has_an_example():
    codes = rule_codes()
    assert len(codes) == len(set(codes))
    table = Path(__file__).parents[2].joinpath("docs/rules.md").read_text()
    assert re.findall(r"^\| (AT\d+) \|", table, re.MULTILINE) == codes
    assert {*EXAMPLES, "AT116", "AT117", *FILE_RULES} == set(codes)


SPLIT = replace(FSDP, dp_shard=2, tp=2, grad_accum_steps=8)


@pytest.mark.parametrize(
    ("plan", "workload", "words"),
    [
        (replace(SPLIT, dp_shard=1, tp=3), WORKLOAD, "8 attention heads and 4 key-value heads and"),
        (replace(SPLIT, dp_shard=1, tp=3), WORKLOAD, "Degrees that do: 1, 2, 4."),
        (SPLIT, lora(), "with an adapter is not run"),
        (SPLIT, changed(liger=("rope",)), "with Liger's kernels is not run"),
        (
            replace(SPLIT, offload_params=True, offload_optimizer=True),
            WORKLOAD,
            "with offload to the host is not run",
        ),
        (replace(SPLIT, dp_shard=1, cp=2, cp_backend=CpBackend.RING), WORKLOAD, "ring attention"),
        (replace(DDP, dp_replicate=2, tp=2), WORKLOAD, "the engine is ddp"),
    ],
)
def test_what_tensor_parallelism_does_not_split(plan, workload, words):
    broken = {v.code: str(v) for v in check_plan(plan, MODEL, workload, HARDWARE)}
    assert words in broken["AT115"]


@pytest.mark.parametrize("name", ["gpt-oss-20b", "mixtral-8x7b", "phi-4", "olmo-2-7b"])
def test_models_that_tensor_parallelism_does_not_split(name):
    assert "AT115" in {v.code for v in check_plan(SPLIT, load_model(name), WORKLOAD, HARDWARE)}


def test_heads_are_split_twice():
    """By tensor parallelism and, of what is left to a rank, by Ulysses."""
    twice = replace(SPLIT, dp_shard=1, cp=2, grad_accum_steps=16)
    assert check_plan(twice, MODEL, WORKLOAD, HARDWARE) == []
    eight = load_hardware("h100-sxm", 8)
    broken = check_plan(replace(twice, cp=4), MODEL, WORKLOAD, eight)
    assert [v.code for v in broken] == ["AT106"]
    assert "4 attention and 2 key-value heads of each of 2 tensor-parallel ranks" in str(broken[0])
