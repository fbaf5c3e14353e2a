"""Hand-written Axolotl files: what each means here, what a person is told, and the way back."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from autotune.config import load_config
from autotune.config.keys import key_catalogue
from autotune.emit.run_config import emit_run_config
from autotune.plan import Recompute
from autotune.spec.workload import Precision

FOLDER = Path(__file__).parent / "axolotl"

# By file: GPUs, strategy, dp_replicate, dp_shard, cp on them, and words of its warnings in order.
FILES: dict[str, tuple[int, str, tuple[int, int, int], list[str]]] = {
    "anchors": (2, "ddp", (2, 1, 1), ["embedding_lr"]),
    "batch-size": (2, "ddp", (2, 1, 1), []),
    "best-yml-edited": (4, "zero2", (1, 4, 1), []),
    "chat-template": (1, "ddp", (1, 1, 1), ["eot_tokens, special_tokens"]),
    "chat-template-chatml": (1, "ddp", (1, 1, 1), ["default_system_message"]),
    "context-parallel-fsdp2": (8, "fsdp2", (1, 2, 4), []),
    "cut-cross-entropy-plugin": (
        2, "ddp", (2, 1, 1), ["runs as chunked_cross_entropy", "plugins, spectrum_model_name"]
    ),
    "data-settings": (1, "ddp", (1, 1, 1), []),
    "deepspeed-file-beside": (4, "zero3", (1, 4, 1), []),
    "deepspeed-file-with-compile-block": (2, "zero1", (1, 2, 1), ["torch_compile: true"]),
    "deepspeed-inline-auto": (
        8, "zero3", (1, 8, 1), ["max_live_parameters, max_reuse_distance, sub_group_size"]
    ),
    "deepspeed-inline-offload": (2, "zero2_offload_optimizer", (1, 2, 1), []),
    "deepspeed-inline-sizes": (2, "zero2", (1, 2, 1), ["round_robin_gradients"]),
    "deepspeed-torch-compile-preset": (2, "zero1", (1, 2, 1), []),
    "deepspeed-zero1-fetched-path": (2, "zero1", (1, 2, 1), ["flash_attention (now attn_impl"]),
    "deepspeed-zero2-name": (2, "zero2", (1, 2, 1), []),
    "deepspeed-zero3-bf16": (2, "zero3", (1, 2, 1), []),
    "deepspeed-zero3-bf16-cpuoffload": (2, "zero3_offload_params", (1, 2, 1), []),
    "float32-key": (1, "ddp", (1, 1, 1), []),
    "fp32": (1, "ddp", (1, 1, 1), []),
    "fsdp1-config-alone": (2, "fsdp2", (1, 2, 1), ["FSDP1 (fsdp_version is not set)"]),
    "fsdp1-grad-op": (2, "fsdp2_no_reshard", (1, 2, 1), ["FSDP1 (fsdp_version 1)"]),
    "fsdp1-hybrid": (8, "hsdp_no_reshard", (2, 4, 1), ["FSDP1", "sharding_strategy"]),
    "fsdp1-ignored-strategy": (
        2, "fsdp2", (1, 2, 1),
        ["FSDP1", "SHARD_GRAD_OP is ignored, as Axolotl ignores it", "backward_prefetch"],
    ),
    "fsdp1-list": (2, "fsdp2", (1, 2, 1), ["reshard_after_forward: true", "final_state_dict"]),
    "fsdp1-list-and-plain-config": (2, "fsdp2", (1, 2, 1), ["FSDP1", "use_orig_params"]),
    "fsdp1-list-and-prefixed-config": (
        8, "fsdp2_offload", (1, 8, 1), ["FSDP1", "limit_all_gathers", "flash_attention (now"]
    ),
    "fsdp1-text-and-offload": (
        2, "fsdp2_offload", (1, 2, 1), ["FSDP1", "use_orig_params", "final_state_dict_type"]
    ),
    "fsdp2-prefixed-keys": (2, "fsdp2", (1, 2, 1), []),
    "fsdp2-v1-leftovers": (
        2, "fsdp2_no_reshard", (1, 2, 1), ["limit_all_gathers", "mixed_precision_policy"]
    ),
    "fsdp2-version-inside": (2, "fsdp2", (1, 2, 1), []),
    "hsdp": (8, "hsdp", (2, 4, 1), []),
    "hsdp-context-parallel": (8, "hsdp", (2, 2, 2), []),
    "liger-plugin": (2, "ddp", (2, 1, 1), ["liger_swiglu (now liger_glu_act"]),
    "llama3-full-fsdp2": (8, "fsdp2", (1, 8, 1), ["evals_per_epoch, saves_per_epoch, special"]),
    "lora-leftovers": (1, "ddp", (1, 1, 1), []),
    "lora-all-linear": (1, "ddp", (1, 1, 1), []),
    "lora-linear-and-modules": (1, "ddp", (1, 1, 1), []),
    "lora-linear": (2, "ddp", (2, 1, 1), []),
    "lora-modules-and-kernels": (2, "zero2", (1, 2, 1), ["lora_mlp_kernel"]),
    "lora-one-module": (2, "ddp", (2, 1, 1), []),
    "null-keys": (2, "ddp", (2, 1, 1), []),
    "old-names": (1, "ddp", (1, 1, 1), ["gc_steps (now torch_empty", "neftune_noise_alpha"]),
    "preference-keys": (1, "ddp", (1, 1, 1), ["dpo_beta (now rl_beta)", "rl, rl_beta, trl, vllm"]),
    "pretraining-dataset": (1, "ddp", (1, 1, 1), []),
    "qwen3-fsdp2-no-reshard": (2, "fsdp2_no_reshard", (1, 2, 1), []),
    "qwen3-fsdp2-offload": (2, "fsdp2_offload", (1, 2, 1), ["cpu_offload_pin_memory"]),
    "sequence-parallel-degree": (4, "zero3", (1, 2, 2), ["sequence_parallel_degree (now con"]),
    "several-datasets": (2, "ddp", (2, 1, 1), ["shuffle_merged_datasets"]),
    "sweep-leftovers": (2, "ddp", (2, 1, 1), []),
    "tensor-parallel": (8, "hsdp", (2, 2, 1), []),
    "test-datasets": (2, "ddp", (2, 1, 1), []),
    "tokenizer-and-nested": (1, "ddp", (1, 1, 1), ["lr_groups, max_memory, overrides_of_model"]),
    "torch-compile": (2, "fsdp2", (1, 2, 1), []),
    "tracking": (1, "ddp", (1, 1, 1), []),
    "unicode-and-quotes": (1, "ddp", (1, 1, 1), ["default_system_message"]),
}  # fmt: skip


def load(name: str):
    return load_config(FOLDER / f"{name}.yml")


def test_every_file_is_in_the_table():
    assert {path.stem for path in FOLDER.glob("*.yml")} == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_meaning(name):
    num_gpus, strategy, mesh, words = FILES[name]
    config = load(name)
    plan = config.plan(num_gpus)
    assert (plan.strategy, (plan.dp_replicate, plan.dp_shard, plan.cp)) == (strategy, mesh)
    assert len(config.warnings) == len(words), config.warnings
    for warning, said in zip(config.warnings, words, strict=True):
        assert said in warning


@pytest.mark.parametrize("name", FILES)
def test_written_and_read_again(name, tmp_path):
    """Read, written under today's names and read again: equal, and nothing left to deprecate."""
    config = load(name)
    path = tmp_path / "again.yml"
    path.write_text(emit_run_config(config), encoding="utf-8")
    again = load_config(path)
    assert again == config
    assert again.plan(FILES[name][0]) == config.plan(FILES[name][0])
    assert not any("deprecated" in warning or "FSDP1" in warning for warning in again.warnings)
    keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    catalogue = key_catalogue()
    old = catalogue.renamed.keys() | catalogue.attention_switches.keys() | {"fsdp"}
    assert not old & set(keys) or all(keys[key] is None for key in old & set(keys))


def test_the_way_back_would_notice_a_lost_key(tmp_path):
    config = load("tracking")
    path = tmp_path / "again.yml"
    path.write_text(emit_run_config(config).replace("mlflow_experiment_name: b\n", ""))
    assert load_config(path) != config


@pytest.mark.parametrize(
    ("name", "found", "expected"),
    [
        ("llama3-full-fsdp2", lambda c: c.train.learning_rate, 2e-5),
        ("llama3-full-fsdp2", lambda c: c.plan(8).recompute, Recompute.FULL),
        ("llama3-full-fsdp2", lambda c: c.contract.precision, Precision.BF16),
        ("llama3-full-fsdp2", lambda c: c.workload_on(8).global_batch_size, 64),
        ("fsdp2-version-inside", lambda c: c.plan(2).recompute, Recompute.FULL),
        ("qwen3-fsdp2-no-reshard", lambda c: c.contract.packing, True),
        ("qwen3-fsdp2-offload", lambda c: c.contract.seq_len, 2048),
        ("qwen3-fsdp2-offload", lambda c: (c.train.warmup_steps, c.train.warmup_ratio), (0, 0.03)),
        ("llama3-full-fsdp2", lambda c: (c.train.warmup_steps, c.train.warmup_ratio), (100, None)),
        ("fp32", lambda c: (c.contract.precision, c.contract.optimizer), (Precision.FP32, "sgd")),
        ("float32-key", lambda c: c.contract.precision, Precision.FP32),
        ("batch-size", lambda c: c.plan(1).grad_accum_steps, 8),
        ("deepspeed-inline-sizes", lambda c: c.plan(2).bucket_elements, 500_000_000),
        ("deepspeed-inline-sizes", lambda c: c.train.max_grad_norm, 0.5),
        ("deepspeed-inline-auto", lambda c: c.plan(2).bucket_elements, 0),
        ("deepspeed-torch-compile-preset", lambda c: c.train.torch_compile, True),
        ("deepspeed-file-with-compile-block", lambda c: c.train.torch_compile, True),
        ("torch-compile", lambda c: c.train.torch_compile, True),
        ("deepspeed-zero3-bf16", lambda c: c.sharding.config["bf16"], {"enabled": True}),
        ("lora-linear", lambda c: len(c.contract.adapter.target_modules), 7),
        ("lora-all-linear", lambda c: len(c.contract.adapter.target_modules), 7),
        ("lora-linear-and-modules", lambda c: len(c.contract.adapter.target_modules), 7),
        ("lora-one-module", lambda c: c.contract.adapter.target_modules, ("down_proj",)),
        ("lora-leftovers", lambda c: (c.contract.adapter, c.passthrough["lora_r"]), (None, 8)),
        ("several-datasets", lambda c: [d.type for d in c.datasets],
         ["alpaca", "completion", "chat_template"]),
        ("data-settings", lambda c: (c.data.train_on_inputs, c.data.excess_length_strategy),
         (True, "truncate")),
        ("pretraining-dataset", lambda c: (c.datasets[0].field, c.data.streaming), ("text", True)),
        ("anchors", lambda c: [d.path for d in c.datasets], ["a.jsonl", "b.jsonl"]),
        ("chat-template-chatml", lambda c: (c.train.val_set_size, c.train.eval_steps), (128, 50)),
        ("sweep-leftovers", lambda c: (c.train.learning_rate, c.train.adam_betas, c.seed),
         (3e-5, (0.9, 0.95), 7)),
        ("sequence-parallel-degree", lambda c: c.passthrough["attn_implementation"],
         "flash_attention_2"),
        ("old-names", lambda c: c.passthrough["attn_implementation"], "sdpa"),
        ("fsdp1-text-and-offload", lambda c: c.sharding.config["final_state_dict_type"],
         "FULL_STATE_DICT"),
        ("tensor-parallel", lambda c: (c.plan(8).tp, c.num_gpus), (2, 8)),
        ("tokenizer-and-nested", lambda c: c.model.tokenizer, "meta-llama/Llama-3.2-1B"),
        ("tokenizer-and-nested", lambda c: c.passthrough["max_memory"], {0: "20GB", "cpu": "64GB"}),
        ("best-yml-edited", lambda c: (c.num_gpus, c.workload.global_batch_size), (4, 32)),
        ("hsdp", lambda c: c.num_gpus, 8),
        ("tracking", lambda c: (c.train.use_tensorboard, c.passthrough["wandb_run_id"]),
         (True, "0042")),
        ("unicode-and-quotes", lambda c: (c.output_dir, c.passthrough["wandb_name"]),
         ("./läufe/числа", "line\nbreak")),
    ],
)  # fmt: skip
def test_values(name, found, expected):
    assert found(load(name)) == expected
