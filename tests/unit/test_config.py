"""Reading configurations: what comes out, and what a person is told about a mistake."""

from __future__ import annotations

import logging
import textwrap
from pathlib import Path

import pytest

from autotune.config import load_config, preset_names
from autotune.config.keys import key_catalogue
from autotune.errors import AutotuneError
from autotune.plan import Engine, Plan, Recompute
from autotune.spec.workload import Precision

BASE = """
base_model: tiny-qwen3
learning_rate: 2e-5
micro_batch_size: 2
gradient_accumulation_steps: 4
"""
FSDP2 = "fsdp_version: 2\nfsdp_config:\n  reshard_after_forward: true\n"


@pytest.fixture
def load(tmp_path):
    def _load(extra: str = "", base: str = BASE):
        path = tmp_path / "config.yml"
        path.write_text(base + textwrap.dedent(extra))
        return load_config(path)

    return _load


def refusal(load, extra: str, base: str = BASE) -> str:
    with pytest.raises(AutotuneError) as error:
        load(extra, base)
    assert error.value.exit_code == 2
    return str(error.value)


def test_defaults_are_axolotls(load):
    config = load()
    assert config.workload.seq_len == 512
    assert not config.workload.packing
    assert config.workload.precision is Precision.BF16
    assert config.workload.optimizer == "adamw"
    assert config.train.lr_scheduler == "cosine"
    assert config.seed == 42
    assert config.output_dir == "./model-out"
    assert config.model.hidden_size == 256


def test_number_that_yaml_reads_as_text(load):
    """PyYAML reads 2e-5, which has no dot, as a string."""
    assert load().train.learning_rate == 2e-5


def test_ddp_without_an_engine(load):
    plan = load().plan(4)
    assert plan == Plan(
        strategy="ddp", engine=Engine.DDP, dp_replicate=4, micro_batch_size=2, grad_accum_steps=4
    )


def test_global_batch_follows_the_gpus(load):
    config = load("context_parallel_size: 2")
    assert config.workload_on(8).global_batch_size == 2 * 4 * 4
    assert config.workload.global_batch_size == 2 * 4


def test_block_names_the_gpus(load):
    assert load("autotune: {num_gpus: 8}").workload.global_batch_size == 64


def test_batch_size_gives_the_accumulation(load):
    base = "base_model: tiny-qwen3\nlearning_rate: 1e-4\nmicro_batch_size: 3\n"
    assert load("batch_size: 12", base).plan(1).grad_accum_steps == 4
    assert "multiple of micro_batch_size 3" in refusal(load, "batch_size: 10", base)
    assert "exclude each other" in refusal(load, "batch_size: 8")


# --- the file itself


def test_malformed_yaml_names_line_and_column(load):
    message = refusal(load, "datasets: [a, b\nseed: 1\n", "base_model: x\n")
    assert "config.yml, line 3, column 5: not valid YAML" in message


def test_repeated_key(load):
    assert "'learning_rate' stands here a second time" in refusal(load, "learning_rate: 1e-4")


def test_missing_file(tmp_path):
    with pytest.raises(AutotuneError, match="no such file"):
        load_config(tmp_path / "none.yml")


def test_folder_and_bytes(tmp_path):
    with pytest.raises(AutotuneError, match="is a folder"):
        load_config(tmp_path)
    (tmp_path / "b.yml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(AutotuneError, match="not UTF-8"):
        load_config(tmp_path / "b.yml")


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just text\n"])
def test_no_mapping(load, text):
    assert "at the top level" in refusal(load, "", text)


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("context_parapllel_size: 2", "context_parallel_size"),
        ("gradient_acumulation_steps: 2", "gradient_accumulation_steps"),
        ("micro_batchsize: 2", "micro_batch_size"),
    ],
)
def test_unknown_key_names_the_nearest(load, key, near):
    message = refusal(load, key)
    assert f"unknown key `{key.split(':')[0]}`" in message
    assert near in message


def test_unknown_keys_are_named_together(load):
    message = refusal(load, "zzzz: 1\nsequence_length: 3\n")
    assert "`zzzz`" in message
    assert "`sequence_length` Nearest: sequence_len" in message


@pytest.mark.parametrize("missing", ["base_model", "learning_rate"])
def test_required_keys(load, missing):
    base = "".join(line for line in BASE.splitlines(True) if missing not in line)
    assert f"{missing} is missing" in refusal(load, "", base)


@pytest.mark.parametrize(
    "extra",
    [
        "sequence_len: 1.5", "sequence_len: many", "sequence_len: true", "sequence_len: 1",
        "sample_packing: 1", "weight_decay: -1", "weight_decay: .nan", "lr_scheduler: cosin",
        "optimizer: lion_8bit", "max_steps: 0", "bf16: full", "num_epochs: .inf",
        "context_parallel_size: 0", "output_dir: 3", "gradient_checkpointing: offload",
        "datasets: data.jsonl", "datasets: [data.jsonl]", "datasets: [{type: alpaca}]",
        "datasets: [{path: a, type: sharegpt}]", "datasets: [{path: a, feild: b}]",
        "test_datasets: [{path: a}]\nval_set_size: 0.1", "warmup_steps: 1\nwarmup_ratio: 0.1",
        "autotune: 3", "autotune: {num_gpus: none}", "autotune: {ladder: [{micro_batch_size: 0}]}",
        "pretraining_dataset: [{path: a}]",
    ],
)  # fmt: skip
def test_bad_values_are_refused_with_their_key(load, extra):
    key = extra.split(":")[0]
    message = refusal(load, extra)
    assert key in message
    assert "config.yml" in message


@pytest.mark.parametrize(
    "extra", ["fp16: true", "bfloat16: true", "fp8: true", "load_in_4bit: true"]
)
def test_precision_that_is_not_run_here(load, extra):
    assert extra.split(":")[0] in refusal(load, extra)


@pytest.mark.parametrize(
    ("extra", "precision"),
    [
        ("bf16: auto", Precision.BF16),
        ("bf16: true", Precision.BF16),
        ("bf16: false", Precision.FP32),
        ("float32: true", Precision.FP32),
    ],
)
def test_precision(load, extra, precision):
    assert load(extra).workload.precision is precision


def test_lora(load):
    config = load("adapter: lora\nlora_r: 8\nlora_alpha: 16\nlora_target_linear: true\n")
    assert config.workload.adapter.r == 8
    assert len(config.workload.adapter.target_modules) == 7
    assert "lora_r and lora_alpha" in refusal(load, "adapter: lora")
    assert "lora_target_modules" in refusal(load, "adapter: lora\nlora_r: 8\nlora_alpha: 1")
    assert "Allowed: lora" in refusal(load, "adapter: qlora")


# --- engines


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
    ("text", "words"),
    [
        ("wandb_name: &a [*a]\n", "contains itself"),
        ("wandb_name: 2026-13-45\n", "cannot read"),
        ("wandb_name: " + "[" * 600 + "\n", "nested too deeply"),
        ("seed: " + "9" * 5000 + "\n", "cannot read"),
        ("seed: 1" + "0" * 400 + "\n", "seed"),
        ("fsdp_config: {1: 2}\n", "the key 1 is not text"),
        ("logging_steps: 1e300\n", "up to 9007199254740992"),
    ],
)
def test_what_yaml_can_hold_and_a_configuration_cannot(load, text, words):
    message = refusal(load, text)
    assert words in message
    assert len(message) < 2000


@pytest.mark.parametrize("name", ["~nobody/x", "a" * 5000, "x\\0y"])
def test_a_model_name_that_no_path_can_have(load, name):
    base = BASE.replace("tiny-qwen3", f'"{name}"')
    assert len(refusal(load, "", base)) < 15_000


def test_tensor_parallel_and_two_names_of_one_degree(load):
    assert "not run here yet" in refusal(load, "tensor_parallel_size: 2")
    text = "context_parallel_size: 2\nsequence_parallel_degree: 4"
    assert "contradict" in refusal(load, text)


# --- what is not used


def test_ignored_keys_are_named_once_and_kept(load, caplog):
    with caplog.at_level(logging.WARNING, logger="autotune"):
        config = load("rl: dpo\nliger_rope: true\nlora_qkv_kernel: true\nwandb_name: x\nrelora:\n")
    assert len(caplog.records) == 1
    assert "liger_rope, lora_qkv_kernel, rl" in caplog.text
    assert "wandb_name" not in caplog.text
    assert config.passthrough["rl"] == "dpo"
    assert config.passthrough["wandb_name"] == "x"
    assert "base_model" not in config.passthrough


def test_a_key_that_is_off_is_not_warned_about(load):
    assert load("liger_rope: false\nrl:\nplugins: []\n").warnings == ()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("sequence_parallel_degree: 1", "context_parallel_size"),
        ("flash_attention: true", "attn_implementation: flash_attention_2"),
        ("sdp_attention: true", "attn_implementation: sdpa"),
        ("gc_steps: 5", "torch_empty_cache_steps"),
        ("fsdp_final_state_dict_type: FULL_STATE_DICT\n" + FSDP2, "final_state_dict_type"),
    ],
)
def test_deprecated_keys_name_their_successor(load, old, new):
    config = load(old)
    (warning,) = config.warnings
    assert f"{old.split(':')[0]} (now {new})" in warning
    assert not set(config.passthrough) & set(key_catalogue().renamed)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("flash_attention: true\nattn_implementation: sdpa", "contradict"),
        ("flash_attention: true\nxformers_attention: true", "contradict"),
        ("dpo_beta: 0.1\nrl_beta: 0.2", "Keep rl_beta"),
        ("max_packed_sequence_len: 2048", "Use sequence_len"),
        ("rope_scaling: {type: linear}", "overrides_of_model_config"),
    ],
)
def test_old_keys_that_cannot_be_read(load, extra, words):
    assert words in refusal(load, extra)


def test_an_old_switch_that_is_off_says_nothing(load):
    config = load("flash_attention: false\nxformers_attention:\nmax_packed_sequence_len:\n")
    assert config.warnings == ()
    assert config.passthrough == {}


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("special_tokens: {pad_tokn: x}", "special_tokens: unknown key `pad_tokn` Nearest: pad_t"),
        ("gradient_checkpointing_kwargs: {reentrant: true}", "Nearest: use_reentrant"),
        ("lr_groups: [{name: a, module: [b], lr: 1}]", "Nearest: modules"),
        ("trl: {num_generation: 4}", "Nearest: num_generations"),
        ("autotune: {num_gpu: 4}", "autotune: unknown key `num_gpu` Nearest: num_gpus"),
    ],
)
def test_unknown_nested_keys(load, extra, words):
    assert words in refusal(load, extra)


@pytest.mark.parametrize(
    ("extra", "asked"),
    [("", False), ("torch_compile: true", True), ("torch_compile: auto", True),
     ("torch_compile: false\ntorch_compile_backend: inductor", False)],
)  # fmt: skip
def test_torch_compile(load, extra, asked):
    assert load(extra).train.torch_compile is asked


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("torch_compile_backend: cudagraphs", "Allowed: inductor"),
        ("torch_compile: sometimes", "true, false or auto"),
        ("torch_compile: true\ndeepspeed: zero3.json", "does not run with ZeRO-3"),
    ],
)
def test_compiling_that_is_not_run_here(load, extra, words):
    assert words in refusal(load, extra)


def test_dataset_keys_that_would_change_the_training_are_refused(load):
    with pytest.raises(AutotuneError, match="roles_to_train is not used here yet"):
        load("datasets: [{path: a.jsonl, type: alpaca, roles_to_train: [a]}]")


# --- paths


def test_data_and_model_beside_the_file(tmp_path, monkeypatch, load):
    (tmp_path / "data.jsonl").write_text("{}")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = load("datasets: [{path: data.jsonl}, {path: other.jsonl}]")
    assert [Path(source.path) for source in config.datasets] == [
        tmp_path / "data.jsonl",
        Path("other.jsonl"),
    ]


def test_presets_are_listed():
    assert preset_names() == [
        "zero1.json", "zero1_torch_compile.json", "zero2.json", "zero2_cpuoffload.json",
        "zero3.json",
        "zero3_bf16.json", "zero3_bf16_cpuoffload_all.json", "zero3_bf16_cpuoffload_params.json",
    ]  # fmt: skip
