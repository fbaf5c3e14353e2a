"""FSDP in every spelling, and the mesh: what runs, and what cannot."""

from __future__ import annotations

import pytest

from autotune.errors import AutotuneError
from autotune.plan import Engine, Recompute
from tests.unit.config_files import FSDP2, loader, refusal


@pytest.fixture
def load(tmp_path):
    return loader(tmp_path)


def test_both_engines(load):
    assert "exclude each other" in refusal(load, "deepspeed: zero2.json\n" + FSDP2)


def test_fsdp2(load):
    config = load("fsdp_version: 2\nfsdp_config: {reshard_after_forward: false}\n")
    plan = config.plan(8)
    assert (plan.strategy, plan.dp_shard, plan.dp_replicate) == ("fsdp2_no_reshard", 8, 1)


def test_fsdp_prefix_is_taken_off(load):
    text = "fsdp_version: 2\nfsdp_config: {fsdp_offload_params: true, fsdp_version: 2}\n"
    assert load(text).plan(2).strategy == "fsdp2_offload"


def test_fsdp_activation_checkpointing_is_recompute(load):
    text = "fsdp_version: 2\nfsdp_config: {activation_checkpointing: true}\n"
    assert load(text).plan(2).recompute is Recompute.FULL
    assert load(FSDP2).plan(2).recompute is Recompute.NONE
    assert load("gradient_checkpointing: true").plan(2).recompute is Recompute.FULL


@pytest.mark.parametrize(
    ("extra", "strategy"),
    [
        ("fsdp: [full_shard, auto_wrap]", "fsdp2"),
        ("fsdp: [shard_grad_op, auto_wrap]", "fsdp2_no_reshard"),
        ("fsdp: full_shard offload auto_wrap", "fsdp2_offload"),
        ("fsdp_config: {reshard_after_forward: true}", "fsdp2"),
        ("fsdp_version: 1\nfsdp_config: {offload_params: true}", "fsdp2_offload"),
        ("fsdp_config: {version: 1, fsdp_offload_params: true}", "fsdp2_offload"),
        ("fsdp: [hybrid_shard]\ndp_replicate_size: 2", "hsdp"),
        ("fsdp: [hybrid_shard_zero2]\ndp_shard_size: 2", "hsdp_no_reshard"),
    ],
)
def test_fsdp1_runs_as_fsdp2_and_says_so(load, extra, strategy):
    config = load(extra)
    plan = config.plan(4)
    assert (plan.strategy, plan.engine) == (strategy, Engine.FSDP2)
    (warning,) = config.warnings
    assert "this is FSDP1" in warning
    assert f"reshard_after_forward: {str(plan.reshard_after_forward).lower()}" in warning
    assert "fsdp_version: 2" in warning


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("fsdp: [no_shard]", "Remove fsdp and fsdp_config"),
        ("fsdp: [hybrid_shard, auto_wrap]", "dp_replicate_size (nodes)"),
        ("fsdp: [full_shard, shard_grad_op]", "one strategy"),
        ("fsdp: [full_shards]", "Nearest: full_shard."),
        ("fsdp: true", "fsdp_version: 2"),
        ("fsdp: [full_shard]\nfsdp_config: {reshard_after_forward: false}", "contradict"),
        ("fsdp: [full_shard, offload]\nfsdp_config: {offload_params: false}", "contradict"),
        ("fsdp_version: 2\nfsdp_config: {fsdp_version: 1, offload_params: true}", "contradict"),
        ("fsdp_version: 3\nfsdp_config: {offload_params: true}", "Write 2"),
        ("fsdp_config: {fsdp_offload_params: true, offload_params: false}", "contradict"),
        ("fsdp_config: {auto_wrap_policy: SIZE_BASED_WRAP}", "TRANSFORMER_BASED_WRAP"),
        ("fsdp_config: {sharding_strategy: FULL_SHARDING}", "Known: FULL_SHARD"),
        ("fsdp_config: {cpu_offload_pin_memory: false}", "offload_params: true"),
    ],
)
def test_fsdp1_without_a_counterpart(load, extra, words):
    assert words in refusal(load, extra)


@pytest.mark.parametrize("value", ["SHARD_GRAD_OP", "2", "NO_SHARD", "HYBRID_SHARD"])
def test_a_strategy_that_axolotl_ignores_is_ignored_aloud(load, value):
    config = load(f"fsdp: [full_shard]\nfsdp_config: {{fsdp_sharding_strategy: {value}}}\n")
    assert config.plan(2).strategy == "fsdp2"
    assert f"sharding_strategy: {value} is ignored, as Axolotl ignores it" in config.warnings[1]


@pytest.mark.parametrize("version", ["fsdp_version: 2\n", ""])
def test_dropped_keys_are_named(load, version):
    text = version + (
        "fsdp_config: {fsdp_limit_all_gathers: true, backward_prefetch: BACKWARD_PRE, "
        "sync_module_states: true, sharding_strategy: FULL_SHARD, mixed_precision_policy: bf16}\n"
    )
    config = load(text)
    dropped, unused = config.warnings[-2:]
    for key in ("limit_all_gathers", "backward_prefetch", "sync_module", "sharding_strategy"):
        assert key in dropped
        assert key not in str(config.sharding.config)
    assert "mixed_precision_policy" in unused
    assert config.sharding.config["mixed_precision_policy"] == "bf16"


@pytest.mark.parametrize(
    "inner", ["reshard_after_foward: true", "reshard_after_forward: FULL_SHARD",
              "auto_wrap_policy: SIZE_BASED_WRAP", "state_dict_type: LOCAL_STATE_DICT"],
)  # fmt: skip
def test_fsdp_config_is_checked(load, inner):
    message = refusal(load, f"fsdp_version: 2\nfsdp_config: {{{inner}}}\n")
    assert "fsdp_config" in message
    assert inner.split(":")[0] in message


def test_fsdp_version_alone(load):
    assert "fsdp_config is empty" in refusal(load, "fsdp_version: 2")


# --- mesh


@pytest.mark.parametrize(
    ("extra", "num_gpus", "mesh"),
    [
        (FSDP2, 8, (8, 1, 1)),
        (FSDP2 + "dp_shard_size: 4", 8, (4, 2, 1)),
        (FSDP2 + "dp_replicate_size: 2", 8, (4, 2, 1)),
        (FSDP2 + "dp_replicate_size: 2\ndp_shard_size: 2\ncontext_parallel_size: 2", 8, (2, 2, 2)),
        (FSDP2 + "sequence_parallel_degree: 4", 8, (2, 1, 4)),
        ("deepspeed: zero3.json\ncontext_parallel_size: 2\ndp_shard_size: 2", 4, (2, 1, 2)),
        ("context_parallel_size: 2", 4, (1, 2, 2)),
    ],
)
def test_mesh(load, extra, num_gpus, mesh):
    plan = load(extra).plan(num_gpus)
    assert (plan.dp_shard, plan.dp_replicate, plan.cp) == mesh
    assert plan.world_size == num_gpus


@pytest.mark.parametrize(
    ("extra", "num_gpus", "words"),
    [
        (FSDP2 + "dp_shard_size: 3", 8, "= 6, but there are 8 GPUs"),
        (FSDP2 + "dp_shard_size: 16", 8, "= 16, but there are 8 GPUs"),
        (FSDP2 + "dp_shard_size: 4\ndp_replicate_size: 4", 8, "= 16, but there are 8 GPUs"),
        ("context_parallel_size: 3", 8, "does not divide 8 GPUs. These divide it: 1, 2, 4, 8"),
        ("context_parallel_size: 16", 8, "does not divide 8 GPUs"),
        ("tensor_parallel_size: 3", 8, "[AT102] tensor_parallel_size 3 does not divide 8 GPUs"),
        (
            "tensor_parallel_size: 4\ncontext_parallel_size: 4",
            8,
            "context_parallel_size 4 x tensor_parallel_size 4 does not divide 8 GPUs",
        ),
        ("dp_shard_size: 4", 4, "needs an engine that shards"),
        ("deepspeed: zero3.json\ndp_replicate_size: 2", 4, "Use fsdp_version: 2"),
        ("", 0, "at least 1"),
    ],
)
def test_mesh_that_does_not_fit(load, extra, num_gpus, words):
    with pytest.raises(AutotuneError) as error:
        load(extra).plan(num_gpus)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("extra", "backend", "stride"),
    [
        ("context_parallel_size: 2", "ulysses", 1),
        ("context_parallel_size: 2\nring_attn_func: batch_ring", "ring", 1),
        ("context_parallel_size: 2\nring_attn_func: varlen_llama3", "ring", 1),
        ("context_parallel_size: 2\nheads_k_stride: 2\nsample_packing: true", "ring", 2),
        ("context_parallel_size: 2\nheads_k_stride: 2", "ring", 1),  # nothing is gathered
        ("context_parallel_size: 8", "ring", 1),  # of 4 key-value heads
        ("ring_attn_func: batch_ring\nheads_k_stride: 2", "ulysses", 1),
    ],
)
def test_how_sequences_are_split(load, extra, backend, stride):
    plan = load(extra).plan(8)
    assert (str(plan.cp_backend), plan.heads_k_stride) == (backend, stride)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("ring_attn_func: zigzag", "batch_ring, varlen_llama3"),
        ("ring_attn_func: batch_ring\nsample_packing: true", "documents would see one another"),
        ("heads_k_stride: 0", "at least 1"),
    ],
)
def test_a_ring_that_is_not_run(load, extra, words):
    assert words in refusal(load, "context_parallel_size: 2\n" + extra)


def test_two_names_of_one_degree(load):
    text = "context_parallel_size: 2\nsequence_parallel_degree: 4"
    assert "contradict" in refusal(load, text)


@pytest.mark.parametrize("tp", [0, "two", 1.5])
def test_tensor_parallel_sizes_that_are_none(load, tp):
    assert "tensor_parallel_size" in refusal(load, f"tensor_parallel_size: {tp}")


def test_torch_compile_with_tensor_parallelism_was_never_run(load):
    said = refusal(load, "tensor_parallel_size: 2\ntorch_compile: true")
    assert "torch_compile with tensor_parallel_size above 1" in said
