"""Adapters in 4 bits, Liger, losses, offloading and 8-bit optimizers: read, refused, explained."""

from __future__ import annotations

import pytest
import yaml

from autotune.config.kernels import CUT_PLUGIN, LIGER_PLUGIN
from autotune.emit.axolotl import emit_axolotl
from autotune.emit.run_config import emit_run_config
from autotune.spec.workload import BaseStorage, LigerKernel
from tests.unit.config_files import BASE, FSDP2, loader, refusal

QLORA = "adapter: qlora\nload_in_4bit: true\nlora_r: 8\nlora_alpha: 16\nlora_target_linear: true\n"
LORA = QLORA.replace("qlora", "lora").replace("load_in_4bit: true\n", "")
LIGER = f"plugins: [{LIGER_PLUGIN}]\n"
CUT = f"plugins: [{CUT_PLUGIN}]\n"


@pytest.fixture
def load(tmp_path):
    return loader(tmp_path)


@pytest.mark.parametrize(
    ("more", "storage"),
    [
        ("", BaseStorage.NF4_DOUBLE),  # Axolotl's default
        ("bnb_config_kwargs: {bnb_4bit_use_double_quant: false}", BaseStorage.NF4),
        ("bnb_config_kwargs: {bnb_4bit_quant_storage: bfloat16}", BaseStorage.NF4_DOUBLE),
        ("bf16: false\nbnb_config_kwargs: {bnb_4bit_quant_storage: float32}",
         BaseStorage.NF4_DOUBLE),
    ],
)  # fmt: skip
def test_a_base_in_4_bits(load, more, storage):
    config = load(QLORA + more)
    assert config.contract.adapter.base_storage is storage
    assert config.warnings == ()
    assert load(LORA + "load_in_4bit: true\n" + more).contract == config.contract


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (QLORA.replace("load_in_4bit: true\n", ""), "qlora needs load_in_4bit: true"),
        ("load_in_4bit: true", "add adapter: qlora"),
        (QLORA + "load_in_8bit: true", "remove it"),
        (QLORA + "bnb_config_kwargs: {bnb_4bit_quant_type: fp4}", "may be nf4"),
        (QLORA + "bnb_config_kwargs: {bnb_4bit_quant_storage: uint8}", "may be bfloat16, the type"),
        (QLORA + "bf16: false\nbnb_config_kwargs: {bnb_4bit_quant_storage: bfloat16}",
         "may be float32, the type"),
        (QLORA + "bnb_config_kwargs: {bnb_4bit_quant_storge: bfloat16}", "Keys that are read"),
        (QLORA + "bnb_config_kwargs: nf4", "Write a mapping"),
        (QLORA + "peft_use_dora: yes please", "Write true or false"),
    ],
)  # fmt: skip
def test_what_cannot_be_in_4_bits(load, text, words):
    assert words in refusal(load, text)


def test_rslora_and_dora(load):
    adapter = load(LORA + "peft_use_rslora: true\npeft_use_dora: true\n").contract.adapter
    assert adapter.rslora and adapter.dora and adapter.base_storage is None


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [("adamw_bnb_8bit", "adamw_8bit"), ("adamw_8bit", "adamw_8bit"),
     ("paged_adamw_8bit", "paged_adamw_8bit")],
)  # fmt: skip
def test_8_bit_optimizers(load, name, optimizer):
    assert load(f"optimizer: {name}").contract.optimizer == optimizer


def test_liger_by_its_plugin(load):
    config = load(LIGER + "liger_rope: true\nliger_swiglu: true\nliger_rms_norm: false\n")
    assert config.contract.liger == (LigerKernel.ROPE, LigerKernel.GLU_ACTIVATION)
    assert "plugins" not in config.passthrough and "not used" not in " ".join(config.warnings)


def test_liger_by_the_trainer_s_own_switch(load):
    assert load("use_liger_kernel: true").contract.liger == tuple(LigerKernel)


def test_without_the_plugin_its_keys_do_nothing_as_in_axolotl(load):
    config = load("liger_rope: true")
    assert config.contract.liger == ()
    assert "liger_rope" in config.warnings[0] and config.passthrough["liger_rope"] is True


def test_kernels_that_are_not_run(load):
    assert "liger_layer_norm" in refusal(load, LIGER + "liger_layer_norm: true")


def test_other_plugins_stay(load):
    config = load(f"plugins: [{LIGER_PLUGIN}, some.Other]\nliger_rope: true\n")
    assert config.contract.liger == (LigerKernel.ROPE,)
    assert config.passthrough["plugins"] == ["some.Other"] and "plugins" in config.warnings[0]


def test_cut_cross_entropy_says_what_runs(load):
    config = load(CUT)
    assert config.contract.chunked_loss
    assert len(config.warnings) == 1 and "runs as chunked_cross_entropy" in config.warnings[0]
    assert load(CUT + "cut_cross_entropy: false").contract.chunked_loss is False


@pytest.mark.parametrize(
    "text",
    [
        CUT + "chunked_cross_entropy: true",
        LIGER + "liger_fused_linear_cross_entropy: true\nchunked_cross_entropy: true",
        f"plugins: [{LIGER_PLUGIN}, {CUT_PLUGIN}]\nliger_fused_linear_cross_entropy: true",
    ],
)
def test_one_loss_at_a_time(load, text):
    assert "exclude each other" in refusal(load, text)


def test_activation_offloading(load):
    given = "gradient_checkpointing: true\nactivation_offloading: "
    assert load(given + "true").contract.activation_offloading
    assert "disk" in refusal(load, given + "disk")


def test_a_number_of_chunks_is_kept(load):
    config = load("chunked_cross_entropy: true\nchunked_cross_entropy_num_chunks: 16")
    assert config.passthrough == {"chunked_cross_entropy_num_chunks": 16}
    assert "chunked_cross_entropy_num_chunks" in config.warnings[0]


@pytest.mark.parametrize(("text", "loads"), [(QLORA, False), (LORA, True)])
def test_4_bits_under_fsdp2_are_written_for_axolotl(load, text, loads):
    config = load(text + FSDP2)
    model, plan = config.model, config.plan(2)
    written = yaml.safe_load(emit_axolotl(model, config.workload_on(2), plan))
    assert written["fsdp_config"]["cpu_ram_efficient_loading"] is loads
    assert written.get("load_in_4bit") is (None if loads else True)


@pytest.mark.parametrize(
    "text",
    [
        QLORA + "bnb_config_kwargs: {bnb_4bit_use_double_quant: false}",
        LORA + "peft_use_rslora: true\npeft_use_dora: true",
        LIGER + "liger_rope: true\nliger_fused_linear_cross_entropy: true",
        f"plugins: [{LIGER_PLUGIN}, {CUT_PLUGIN}]\nliger_rms_norm: true",
        "use_liger_kernel: true\noptimizer: adamw_bnb_8bit",
        "chunked_cross_entropy: true\nactivation_offloading: true\ngradient_checkpointing: true",
    ],
)
def test_written_and_read_again(load, text):
    config = load(text)
    again = load(emit_run_config(config), base="")
    assert again == config and BASE


@pytest.mark.parametrize(
    ("text", "fp8", "gathered"),
    [
        ("fp8: true", True, False),
        ("fp8: false", False, False),
        ("fp8: true\nfp8_config: {recipe: tensorwise}", True, False),
        ("fp8: true\nfp8_enable_fsdp_float8_all_gather: true\n" + FSDP2, True, True),
    ],
)
def test_fp8_is_read_and_written(load, text, fp8, gathered):
    config = load(text)
    assert (config.contract.fp8, config.contract.fp8_all_gather) == (fp8, gathered)
    written = yaml.safe_load(emit_run_config(config))
    assert written.get("fp8", False) is fp8
    assert written.get("fp8_enable_fsdp_float8_all_gather", False) is gathered


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fp8: 1", "Write true or false"),
        ("fp8: true\nfp8_config: {recipe: rowwise}", "Allowed: tensorwise"),
        ("fp8: true\nfp8_config: tensorwise", "Write a mapping"),
        ("fp8: true\nfp8_enable_fsdp_float8_all_gather: true", "AT152"),
    ],
)
def test_fp8_that_is_not_run(load, text, words):
    assert words in refusal(load, text)
