"""`deepspeed:` as a path, a preset or a mapping, and what of it is honoured."""

from __future__ import annotations

import json

import pytest

from autotune.config import load_config, preset_names
from autotune.errors import AutotuneError

BASE = {
    "base_model": "tiny-qwen3",
    "learning_rate": 1e-4,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 4,
}


@pytest.fixture
def load(tmp_path):
    def _load(deepspeed, **extra):
        path = tmp_path / "config.yml"
        path.write_text(json.dumps(BASE | {"deepspeed": deepspeed} | extra))  # JSON is YAML
        return load_config(path)

    return _load


def zero(stage: int = 2, **more):
    return {"zero_optimization": {"stage": stage, **more}}


def refusal(load, deepspeed, **extra) -> str:
    with pytest.raises(AutotuneError) as error:
        load(deepspeed, **extra)
    return str(error.value)


@pytest.mark.parametrize(
    ("preset", "strategy"),
    [
        ("zero1.json", "zero1"),
        ("zero1_torch_compile.json", "zero1"),
        ("zero2.json", "zero2"),
        ("zero2_cpuoffload.json", "zero2_offload_optimizer"),
        ("zero3.json", "zero3"),
        ("zero3_bf16.json", "zero3"),
        ("zero3_bf16_cpuoffload_params.json", "zero3_offload_params_only"),
        ("zero3_bf16_cpuoffload_optimizer.json", "zero3_offload_optimizer"),
        ("zero3_bf16_cpuoffload_all.json", "zero3_offload_params"),
        ("zero3_bf16_hpz.json", "zero3_hpz8"),
    ],
)
def test_presets(load, preset, strategy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for spelling in (preset, f"deepspeed_configs/{preset}", preset.removesuffix(".json")):
        config = load(spelling)
        assert config.plan(2).strategy == strategy
        assert config.plan(2).bucket_elements == 0
        assert config.warnings == ()
        assert config.train.torch_compile == ("compile" in preset)


def test_a_bf16_preset_is_no_fp32_run(load):
    assert "The YAML says fp32" in refusal(load, "zero3_bf16", bf16=False)
    assert load("zero3", bf16=False).plan(2).zero_stage == 3


def test_every_preset_is_covered_above():
    cases = test_presets.pytestmark[0].args[1]
    assert sorted(case[0] for case in cases) == preset_names()


def test_a_file_wins_over_a_preset(load, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "zero2.json").write_text(json.dumps(zero(3)))
    assert load("zero2.json").plan(2).zero_stage == 3
    (tmp_path / "elsewhere" / "zero2.json").write_text(json.dumps(zero(1)))
    assert load("zero2.json").plan(2).zero_stage == 1


def test_missing_file_names_the_nearest(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zero3_custom.json").write_text("{}")
    assert f"Nearest: {tmp_path}/zero3_custom.json" in refusal(load, "zero3_costum.json")
    assert "Nearest: zero3_bf16.json" in refusal(load, "deepspeed_configs/zero3_bf_16.json")


def test_missing_file_lists_the_presets(load):
    message = refusal(load, "zero4.json")
    assert all(name in message for name in preset_names())
    assert "no such file" in refusal(load, "/somewhere/else/zero2.json")


def test_malformed_json(load, tmp_path):
    (tmp_path / "mine.json").write_text('{"a": 1,}')
    assert "mine.json, line 1, column 9: not valid JSON" in refusal(load, "mine.json")


@pytest.mark.parametrize(
    ("deepspeed", "words"),
    [
        ({"zero_optimisation": {"stage": 2}}, "Nearest: zero_optimization"),
        (zero(reduce_bucket_sise=1), "Nearest: reduce_bucket_size"),
        (zero(offload_optimizer={"devise": "cpu"}), "Nearest: device"),
        ({}, "zero_optimization is missing"),
        (zero(0), "DDP"),
        (zero(4), "Allowed: 1, 2, 3"),
        (zero(2, offload_param={"device": "cpu"}), "Only stage 3"),
        (zero(3, offload_param={"device": "nvme"}), "Allowed: none, cpu"),
        (zero(3, offload_optimizer={"device": "cpu", "ratio": 0.5}), "Partial"),
        (zero(2, cpu_offload=True), "offload_optimizer"),
        (zero(2, zero_hpz_partition_size=8), "Only stage 3"),
        (zero(3, zero_quantized_weights=True), "zero_quantized_weights"),
        (zero() | {"fp16": {"enabled": True}}, "fp16 is not run here"),
        (zero() | {"bf16": {"enabled": False}}, "The YAML says bf16"),
        (zero() | {"optimizer": {"type": "Adam"}}, "optimizer"),
        (zero() | {"scheduler": {"type": "WarmupLR"}}, "scheduler"),
        (zero() | {"data_types": {"grad_accum_dtype": "bf16"}}, "accumulated in fp32"),
        (zero() | {"communication_data_type": "bf16"}, "reduced in fp32"),
        (zero() | {"train_micro_batch_size_per_gpu": 8}, "micro_batch_size: 2"),
        (zero() | {"gradient_accumulation_steps": 8}, "gradient_accumulation_steps: 4"),
        (zero() | {"train_batch_size": 7}, 'Write "auto"'),
        (zero() | {"compile": {"deepcompile": True}}, "compile"),
        (zero() | {"compile": {"backend": "eager"}}, "Allowed: inductor"),
        (zero() | {"compile": {"bakend": "inductor"}}, "Nearest: backend"),
        (zero() | {"bf16": {"enable": True}}, "bf16: unknown key `enable` Nearest: enabled"),
        (zero() | {"aio": {"block": 1}}, "Nearest: block_size"),
        (zero() | {"torch_compile": "yes"}, "torch_compile"),
        (zero() | {"bf16": {"bf16_optimizer_states": True}}, "fp32"),
        (3, "neither a path nor a mapping"),
    ],
)
def test_refusals(load, deepspeed, words):
    assert words in refusal(load, deepspeed)


def test_a_key_twice(load, tmp_path):
    (tmp_path / "mine.json").write_text('{"bf16": {"enabled": true, "enabled": false}}')
    assert "'enabled' stands there a second time" in refusal(load, "mine.json")


def test_compiling_is_asked_for_by_our_key_or_by_the_old_block(load):
    config = load(zero() | {"torch_compile": True})
    assert config.train.torch_compile and config.warnings == ()
    old = load(zero() | {"compile": {"disable": False, "backend": "inductor"}})
    assert old.train.torch_compile and old.sharding.config == config.sharding.config
    assert "DeepSpeed from 0.18 on rejects" in old.warnings[0]
    assert not load(zero() | {"compile": {"disable": True}}).train.torch_compile
    both = refusal(load, zero() | {"torch_compile": True}, torch_compile=False)
    assert "The DeepSpeed file asks for it" in both


def test_an_algorithm_switched_off_is_no_matter(load):
    off = {"compile": {"enabled": False}, "prescale_gradients": False, "torch_autocast": None}
    assert load(zero() | off | {"fp16": {"enabled": "auto"}}).warnings == ()


def test_clipping(load):
    stated = zero() | {"gradient_clipping": 0.5}
    assert load(stated).train.max_grad_norm == 0.5
    assert load(zero() | {"gradient_clipping": "auto"}).train.max_grad_norm == 1.0
    assert load(stated, max_grad_norm=0.5).train.max_grad_norm == 0.5
    assert "max_grad_norm: 2" in refusal(load, stated, max_grad_norm=2)


@pytest.mark.parametrize(
    ("sizes", "bucket", "warned"),
    [
        ({}, 0, False),
        ({"reduce_bucket_size": "auto", "allgather_bucket_size": 65536}, 0, False),
        ({"reduce_bucket_size": "auto", "allgather_bucket_size": 500}, 0, True),
        ({"reduce_bucket_size": 5e8, "stage3_prefetch_bucket_size": 5e8}, 500_000_000, False),
        ({"reduce_bucket_size": 1000, "prefetch_bucket_size": 900}, 1000, True),
    ],
)
def test_one_bucket_size(load, sizes, bucket, warned):
    config = load(zero(3, **sizes))
    assert config.plan(2).bucket_elements == bucket
    assert bool(config.warnings) == warned


@pytest.mark.parametrize(
    ("stated", "named"),
    [
        ({"round_robin_gradients": True}, True),
        ({"stage3_max_live_parameters": 0}, True),
        ({"max_reuse_distance": 0}, True),
        ({"leaf_module": {"classes": ["A"]}}, True),
        ({"stage3_max_live_parameters": 1e9, "overlap_comm": False}, False),
        ({"stage3_param_persistence_threshold": "auto", "sub_group_size": None}, False),
    ],
)
def test_settings_the_tool_fixes_are_named(load, stated, named):
    warnings = load(zero(3, **stated)).warnings
    assert len(warnings) == named
    assert all("set by autotune" in w and next(iter(stated)) in w for w in warnings)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"fp16": {"enabled": 1}}, "fp16 is not run here"),
        ({"fp16": {"enabled": "true"}}, "fp16 is not run here"),
        ({"bfloat16": {"bf16_optimizer_states": True}}, "optimizer states are fp32"),
    ],
)
def test_every_spelling_of_low_precision_is_refused(load, more, words):
    assert words in refusal(load, zero() | more)


def test_top_level_keys_that_do_nothing_are_named(load):
    named = {"gradient_predivide_factor": 2.0, "elasticity": {"enabled": True}}
    config = load(zero() | named | {"steps_per_print": 10, "pipeline": {"enabled": False}})
    (warning,) = config.warnings
    assert "not used here: elasticity, gradient_predivide_factor." in warning
