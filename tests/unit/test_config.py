"""Reading configurations: what comes out, and what a person is told about a mistake."""

from __future__ import annotations

import logging
import textwrap
from pathlib import Path

import pytest

from autotune.config import load_config, preset_names
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
        "pretraining_dataset: [{path: a, feild: b}]", "pretraining_dataset: 3",
        "train_on_inputs: 1", "excess_length_strategy: cut",
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
    "extra",
    [
        "fsdp: [full_shard, auto_wrap]",
        "fsdp_config: {reshard_after_forward: true}",
        "fsdp_version: 1\nfsdp_config: {offload_params: true}",
        "fsdp_config: {version: 1, offload_params: true}",
        "fsdp_version: 2\nfsdp_config: {fsdp_version: 1, offload_params: true}",
    ],
)
def test_fsdp1_is_explained(load, extra):
    message = refusal(load, extra)
    assert "FSDP1 is not run here" in message
    assert "fsdp_version: 2" in message


def test_fsdp1_keys_name_their_successor(load):
    text = "fsdp_version: 2\nfsdp_config: {sharding_strategy: SHARD_GRAD_OP}\n"
    assert "reshard_after_forward" in refusal(load, text)


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


def test_deprecated_keys_name_their_successor(load):
    (warning,) = load("sequence_parallel_degree: 1").warnings
    assert "context_parallel_size" in warning


def test_dataset_keys_that_would_change_the_training_are_refused(load):
    with pytest.raises(AutotuneError, match="roles_to_train is not used here with type alpaca"):
        load("datasets: [{path: a.jsonl, type: alpaca, roles_to_train: [a]}]")
    with pytest.raises(AutotuneError, match="message_field_training_detail, split_thinking are"):
        load(
            "datasets: [{path: a, type: chat_template, split_thinking: true, "
            "message_field_training_detail: d}]"
        )


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
        "zero1.json", "zero2.json", "zero2_cpuoffload.json", "zero3.json",
        "zero3_bf16_cpuoffload_all.json", "zero3_bf16_cpuoffload_params.json",
    ]  # fmt: skip
