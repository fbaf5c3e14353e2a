"""What `emit_axolotl` writes, `load_config` reads back to an equal plan, for every strategy."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from autotune.config import AutotuneBlock, fallback_ladder, load_config
from autotune.config.keys import key_catalogue
from autotune.emit.axolotl import emit_axolotl
from autotune.plan import Engine, Plan, Recompute
from autotune.spec.model import load_model
from autotune.spec.strategy import Replicate, Strategy, load_strategies
from autotune.spec.training import DatasetSource, PromptFormat, TrainSettings
from autotune.spec.workload import Lora, Precision, Workload

STRATEGIES = load_strategies(None)
MODEL = load_model("tiny-qwen3")


def plan_of(strategy: Strategy, num_gpus: int, cp: int = 1) -> Plan:
    groups = num_gpus // cp
    replicate = {Replicate.NONE: 1, Replicate.ALL: groups, Replicate.HYBRID: 2}[strategy.replicate]
    return Plan(
        strategy=strategy.name,
        engine=strategy.engine,
        zero_stage=strategy.zero_stage,
        reshard_after_forward=strategy.reshard_after_forward,
        offload_optimizer=strategy.offload_optimizer,
        offload_params=strategy.offload_params,
        dp_replicate=replicate,
        dp_shard=groups // replicate,
        cp=cp,
        micro_batch_size=2,
        grad_accum_steps=3,
    )


def reload(
    tmp_path: Path, plan: Plan, workload: Workload | None = None, train: TrainSettings | None = None
):
    path = tmp_path / "best.yml"
    path.write_text(emit_axolotl(MODEL, workload or Workload(), plan, train=train))
    return load_config(path)


LAYOUTS = [
    pytest.param(strategy, num_gpus, cp, id=f"{strategy.name}-{num_gpus}-cp{cp}")
    for strategy in STRATEGIES
    for num_gpus in (1, 4, 8)
    for cp in (1, 2, 4)
    if num_gpus >= cp * (4 if strategy.replicate is Replicate.HYBRID else 1)
]


@pytest.mark.parametrize(("strategy", "num_gpus", "cp"), LAYOUTS)
def test_plan_comes_back(tmp_path, strategy, num_gpus, cp):
    plan = plan_of(strategy, num_gpus, cp)
    assert reload(tmp_path, plan).plan(num_gpus) == plan


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: strategy.name)
def test_recompute_and_buckets_come_back(tmp_path, strategy):
    bucket = 12345 if strategy.engine is Engine.DEEPSPEED else 0
    plan = replace(plan_of(strategy, 8), recompute=Recompute.FULL, bucket_elements=bucket)
    assert reload(tmp_path, plan).plan(8) == plan


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: strategy.name)
def test_our_own_file_needs_no_warning(tmp_path, strategy, device, caplog):
    path = tmp_path / "best.yml"
    path.write_text(emit_axolotl(MODEL, Workload(), plan_of(strategy, 8, cp=2), device=device))
    with caplog.at_level(logging.WARNING):
        config = load_config(path)
    assert config.warnings == ()
    assert caplog.text == ""


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: strategy.name)
def test_only_keys_of_axolotl_are_written(strategy):
    keys = yaml.safe_load(emit_axolotl(MODEL, Workload(), plan_of(strategy, 8, cp=2)))
    assert set(keys) <= key_catalogue().keys
    assert set(keys.get("fsdp_config", {})) <= key_catalogue().fsdp_keys
    assert not ({"deepspeed", "fsdp_config"} <= set(keys))


@pytest.mark.parametrize(
    "workload",
    [
        Workload(seq_len=4096, global_batch_size=24),
        Workload(global_batch_size=24, optimizer="sgd", precision=Precision.FP32, packing=False),
        Workload(global_batch_size=24, adapter=Lora(r=8, alpha=4, dropout=0.1)),
        Workload(global_batch_size=24, adapter=Lora(target_modules=("q_proj", "v_proj"))),
        Workload(global_batch_size=24, adapter=Lora(rslora=True, dora=True)),
        Workload(global_batch_size=24, adapter=Lora(base_storage="nf4_double")),
        Workload(global_batch_size=24, precision="fp32", adapter=Lora(base_storage="nf4")),
        Workload(global_batch_size=24, optimizer="adamw_8bit", chunked_loss=True),
        Workload(global_batch_size=24, optimizer="paged_adamw_8bit", activation_offloading=True),
        Workload(global_batch_size=24, liger=("rope", "fused_linear_cross_entropy")),
    ],
)
def test_workload_comes_back(tmp_path, workload):
    plan = plan_of(STRATEGIES[0], 4)
    assert plan.global_batch_size == workload.global_batch_size
    assert reload(tmp_path, plan, workload).workload_on(4) == workload


@pytest.mark.parametrize(
    "train",
    [
        TrainSettings(),
        TrainSettings(learning_rate=3e-4, max_steps=100, warmup_ratio=0.1, lr_scheduler="linear"),
        TrainSettings(
            num_epochs=2.5,
            warmup_steps=7,
            weight_decay=0.1,
            adam_betas=(0.8, 0.95),
            adam_epsilon=1e-6,
            max_grad_norm=0.5,
            logging_steps=5,
            eval_steps=10,
            save_steps=20,
            save_total_limit=2,
            val_set_size=0.05,
            use_tensorboard=True,
        ),
    ],
)
@pytest.mark.parametrize("strategy", STRATEGIES[:1] + STRATEGIES[-1:], ids=lambda s: s.name)
def test_train_settings_come_back(tmp_path, strategy, train):
    assert reload(tmp_path, plan_of(strategy, 4), train=train).train == train


def test_data_block_and_output_come_back(tmp_path):
    data = DatasetSource(path="/data/a: b.jsonl", type="completion", field="text")
    plan = plan_of(STRATEGIES[0], 2)
    block = AutotuneBlock(
        version="0.1.0",
        num_gpus=2,
        plan_id=plan.id,
        measured={"tokens_per_s": 1234.5},
        ladder=tuple(fallback_ladder(plan)),
    )
    path = tmp_path / "best.yml"
    text = emit_axolotl(
        MODEL, Workload(), plan, datasets=[data], test_datasets=[data], output_dir="out: x",
        seed=7, autotune=block,
    )  # fmt: skip
    path.write_text(text)
    config = load_config(path)
    assert list(config.datasets) == list(config.test_datasets) == [data]
    assert config.autotune == block
    assert (config.output_dir, config.seed, config.num_gpus) == ("out: x", 7, 2)
    assert config.workload.global_batch_size == plan.global_batch_size


def test_every_key_of_a_data_set_comes_back(tmp_path):
    prompt = PromptFormat(field_instruction="q", format="{instruction}: ", no_input_format="> ")
    chat = DatasetSource(
        path="owner/name", type="chat_template", name="en", revision="v1", split="train[:5%]",
        data_files=["a/*.json"], shards=4, shards_idx=1, skip=2, chat_template="jinja",
        chat_template_jinja="{{ messages }}\n", field_messages="talk", field_tools="calls",
        drop_system_message=True, message_property_mappings={"role": "from"},
        message_field_training="train", roles={"assistant": ["bot"]}, roles_to_train=["tool"],
        train_on_eos="all",
    )  # fmt: skip
    given = [chat, DatasetSource(path="b.csv", type=prompt, ds_type="csv")]
    unset = {name for name in DatasetSource.model_fields if not getattr(chat, name)}
    assert unset == {"ds_type", "field"}, "what no entry of this test states"
    path = tmp_path / "best.yml"
    path.write_text(emit_axolotl(MODEL, Workload(), plan_of(STRATEGIES[0], 2), datasets=given))
    assert list(load_config(path).datasets) == given


def test_without_data_there_is_no_datasets_key():
    assert "datasets" not in yaml.safe_load(
        emit_axolotl(MODEL, Workload(), plan_of(STRATEGIES[0], 2))
    )


def test_the_block_does_not_decide_the_plan(tmp_path):
    """A file edited by hand to another strategy trains that strategy."""
    zero2 = plan_of(next(s for s in STRATEGIES if s.name == "zero2"), 2)
    block = AutotuneBlock(num_gpus=2, plan_id=zero2.id, measured={"tokens_per_s": 1.0})
    keys = yaml.safe_load(emit_axolotl(MODEL, Workload(), zero2, autotune=block))
    del keys["deepspeed"]
    keys |= {"fsdp_version": 2, "fsdp_config": {"reshard_after_forward": False}}
    path = tmp_path / "best.yml"
    path.write_text(yaml.safe_dump(keys))
    plan = load_config(path).plan(2)
    assert (plan.strategy, plan.engine) == ("fsdp2_no_reshard", Engine.FSDP2)
