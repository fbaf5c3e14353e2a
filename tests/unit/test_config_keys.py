"""Keys that are kept, renamed or unknown, and torch.compile."""

from __future__ import annotations

import logging

import pytest

from autotune.config.keys import key_catalogue
from tests.unit.config_files import FSDP2, loader, refusal


@pytest.fixture
def load(tmp_path):
    return loader(tmp_path)


def test_ignored_keys_are_named_once_and_kept(load, caplog):
    with caplog.at_level(logging.WARNING, logger="autotune"):
        config = load("rl: dpo\nliger_rope: true\nlora_qkv_kernel: true\nwandb_name: x\nrelora:\n")
    assert len(caplog.records) == 1
    assert "liger_rope, lora_qkv_kernel, rl" in caplog.text
    assert "wandb_name" not in caplog.text
    assert config.passthrough["rl"] == "dpo"
    assert config.passthrough["wandb_name"] == "x"
    assert "base_model" not in config.passthrough


@pytest.mark.parametrize(
    "key",
    ["auto_find_batch_size", "tiled_mlp", "layer_offloading", "selective_checkpointing",
     "lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_modules_to_save",
     "qlora_sharded_model_loading", "fp32_norms", "deepcompile"],
)  # fmt: skip
def test_keys_of_the_guide_that_are_kept_aloud(load, key):
    """docs/guide.md says of each that it is kept and that nothing here does it."""
    extra = "gradient_checkpointing: true\nadapter: lora\nlora_r: 8\nlora_alpha: 8\n"
    extra += "lora_target_linear: true\n"
    extra += "deepspeed: zero2.json\n" if key == "deepcompile" else FSDP2
    value = ["embed_tokens"] if key == "lora_modules_to_save" else True
    config = load(f"{extra}{key}: {str(value).lower()}\n")
    assert config.passthrough[key] == value
    (warning,) = config.warnings
    assert "not used here, although they would change" in warning and f": {key}." in warning


def test_keys_of_other_launchers_are_kept_quietly(load):
    config = load("use_ray: true\nddp_timeout: 7200\n")
    assert config.passthrough == {"use_ray": True, "ddp_timeout": 7200}
    assert config.warnings == ()


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


def test_aliases_that_stand_for_more_than_anyone_means(load):
    levels = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    assert "its aliases (*) stand for more than" in refusal(load, "\n".join(levels))


def test_many_unknown_keys_are_not_all_named(load):
    message = refusal(load, "\n".join(f"nobody_knows_{n}: 1" for n in range(1000)))
    assert "and 980 more" in message and len(message) < 3000


def test_what_is_on_by_default_and_switched_off_is_named(load):
    config = load("shuffle_merged_datasets: false\nliger_rope: false\n")
    (warning,) = config.warnings
    assert "shuffle_merged_datasets" in warning and "liger" not in warning
