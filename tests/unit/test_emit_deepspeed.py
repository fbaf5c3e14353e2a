"""The DeepSpeed JSON of a plan."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from autotune.emit.deepspeed import deepspeed_config, portable_deepspeed_config
from autotune.plan import Engine, Plan
from autotune.spec.model import load_model
from autotune.spec.workload import Precision, Workload

MODEL = load_model("tiny-qwen3")
PLAN = Plan(
    strategy="zero3", engine=Engine.DEEPSPEED, zero_stage=3, dp_shard=2, cp=2, micro_batch_size=2,
    grad_accum_steps=3,
)  # fmt: skip


def config(plan=PLAN, workload=Workload(), device="cuda", **extra):  # noqa: B008
    return deepspeed_config(plan, MODEL, workload, device=device, **extra)


def test_every_rank_counts_as_data_parallel():
    written = config()
    assert written["train_batch_size"] == 2 * 3 * 4
    assert written["train_micro_batch_size_per_gpu"] == 2
    assert written["gradient_accumulation_steps"] == 3


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", list(Precision))
def test_numerics_contract(stage, precision):
    written = config(replace(PLAN, zero_stage=stage), Workload(precision=precision))
    assert written["bf16"] == {"enabled": precision is Precision.BF16}
    assert written["communication_data_type"] == "fp32"
    assert written["data_types"] == {"grad_accum_dtype": "fp32"}


@pytest.mark.parametrize(("bucket", "expected"), [(0, 256 * 256), (777, 777)])
def test_buckets(bucket, expected):
    zero = config(replace(PLAN, bucket_elements=bucket))["zero_optimization"]
    for key in ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size"):
        assert zero[key] == expected
    assert zero["stage3_param_persistence_threshold"] == 2560


def test_offload_pins_memory_on_cuda_alone():
    plan = replace(PLAN, offload_optimizer=True, offload_params=True)
    for device, pinned in (("cuda", True), ("cpu", False)):
        zero = config(plan, device=device)["zero_optimization"]
        assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": pinned}
        assert zero["offload_param"] == {"device": "cpu", "pin_memory": pinned}
    assert "offload_param" not in config()["zero_optimization"]


def test_cpu_adam_is_forced_for_adam_alone():
    plan = replace(PLAN, offload_optimizer=True)
    assert config(plan)["zero_force_ds_cpu_optimizer"] is True
    assert config(plan, Workload(optimizer="sgd"))["zero_force_ds_cpu_optimizer"] is False
    assert "zero_force_ds_cpu_optimizer" not in config()


def test_stage_3_keys_stay_with_stage_3():
    zero = config(replace(PLAN, zero_stage=2))["zero_optimization"]
    assert not [key for key in zero if key.startswith(("stage3", "sub_group"))]


def test_no_auto_is_left_for_deepspeed_and_clipping_is_the_callers():
    written = config(max_grad_norm=0.25)
    assert '"auto"' not in json.dumps(written)
    assert written["gradient_clipping"] == 0.25


def test_portable_leaves_to_the_trainer_what_it_fills():
    written = portable_deepspeed_config(PLAN, MODEL, Workload(), device="cuda")
    assert written["train_batch_size"] == written["gradient_clipping"] == "auto"
    zero = written["zero_optimization"]
    assert zero["reduce_bucket_size"] == zero["stage3_prefetch_bucket_size"] == "auto"
    assert zero["allgather_bucket_size"] == 65536  # The Trainer does not fill this one.
    chosen = portable_deepspeed_config(
        replace(PLAN, bucket_elements=9), MODEL, Workload(), device="cuda"
    )
    assert chosen["zero_optimization"]["reduce_bucket_size"] == 9


def test_another_engine_is_a_bug_of_the_caller():
    with pytest.raises(ValueError, match="fsdp2"):
        config(Plan(strategy="fsdp2", engine=Engine.FSDP2))
