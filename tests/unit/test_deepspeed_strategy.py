"""A DeepSpeed file as a search's strategy, and `--deepspeed` in place of the file's own key."""

import json

import pytest

from autotune.config import load_config, preset_names
from autotune.config.strategy import strategy_from_deepspeed
from autotune.errors import AutotuneError
from autotune.plan import Engine
from autotune.spec.model import load_model
from autotune.spec.strategy import load_strategies
from autotune.spec.workload import Precision

MODEL = load_model("tiny-qwen3")


def strategy(value, precision=Precision.BF16):
    return strategy_from_deepspeed(str(value), MODEL, precision)


def test_every_preset_is_a_strategy(tmp_path):
    shipped = {each.name: each for each in load_strategies()}
    config = tmp_path / "c.yml"
    config.write_text("base_model: tiny-qwen3\nlearning_rate: 1e-4\n")
    for preset in preset_names():
        found = strategy(preset)
        plan = load_config(config, {"deepspeed": preset}).plan(2)
        assert found.engine is Engine.DEEPSPEED
        assert (found.name, found.zero_stage, found.offload_optimizer, found.offload_params) == (
            plan.strategy, plan.zero_stage, plan.offload_optimizer, plan.offload_params
        )  # fmt: skip
        assert found == shipped.get(found.name, found)
    assert strategy("zero2") == shipped["zero2"]
    assert strategy("zero3_bf16_cpuoffload_params").name not in shipped


def test_what_a_search_leaves_out_is_named(tmp_path, caplog):
    path = tmp_path / "mine.json"
    zero = {"stage": 2, "reduce_bucket_size": 1000}
    path.write_text(json.dumps({"zero_optimization": zero, "gradient_clipping": 0.5}))
    assert strategy(path).name == "zero2"
    assert "without its gradient_clipping, reduce_bucket_size" in caplog.text
    caplog.clear()
    strategy("zero2")
    assert not caplog.text


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 4}, "varies it"),
        ({"zero_optimization": {"stage": 4}}, "Allowed: 1, 2, 3"),
        ({"zero_optimization": {"stag": 2}}, "Nearest: stage"),
        ({}, "zero_optimization is missing"),
        (
            {"zero_optimization": {"stage": 2}, "sequence_parallel_size": 3},
            r"sequence_parallel_size: 3: a search varies it.*--sequence-parallel 3",
        ),
        ({"zero_optimization": {"stage": 2}, "sequence_parallel_size": 0}, "at least 1|minimum"),
        (
            {"zero_optimization": {"stage": 2}, "sequence_parallel_size": "x"},
            "whole number|integer",
        ),
        ({"zero_optimization": {"stage": 2}, "data_parallel_size": 2}, "follows from --gpus"),
    ],
)
def test_refused(tmp_path, values, words):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(values))
    with pytest.raises(AutotuneError, match=words):
        strategy(path)
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, "sequence_parallel_size": 1}))
    assert strategy(path).name == "zero2"


def test_no_such_file_and_another_precision():
    with pytest.raises(AutotuneError, match=r"Nearest: zero2\.json"):
        strategy("zero22")
    with pytest.raises(AutotuneError, match="enabled"):
        strategy("zero3_bf16", Precision.FP32)


def test_an_override_counts_in_place_of_the_file_s_key(tmp_path):
    config = tmp_path / "c.yml"
    config.write_text("base_model: tiny-qwen3\nlearning_rate: 1e-4\ndeepspeed: zero1\n")
    assert load_config(config, {"deepspeed": "zero3.json"}).plan(2).strategy == "zero3"
    assert load_config(config).plan(2).strategy == "zero1"
    config.write_text(
        "base_model: tiny-qwen3\nlearning_rate: 1e-4\nfsdp_version: 2\n"
        "fsdp_config: {reshard_after_forward: true}\n"
    )
    with pytest.raises(AutotuneError, match="exclude each other"):
        load_config(config, {"deepspeed": "zero3.json"})
