"""No setting is dropped in silence: each, changed alone, changes the export or is named.

Every field of a plan, a workload, an adapter, a schedule and the data settings is changed from its
default under every engine and written for every target. The text without its comments must differ
then, or a warning must name the key, or the target must refuse. A new field has to be added here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import pytest

from autotune.emit.job import Exported, Job
from autotune.emit.targets import TARGETS, export
from autotune.errors import AutotuneError
from autotune.plan import CpBackend, Engine, Plan, Recompute
from autotune.spec.model import load_model
from autotune.spec.training import DatasetSource, DataSettings, TrainSettings
from autotune.spec.workload import BaseStorage, LigerKernel, Lora, Precision, Workload

MODEL = load_model("tiny-qwen3")
PLANS = {
    "ddp": Plan(strategy="ddp", engine=Engine.DDP, dp_replicate=4),
    "zero3": Plan(strategy="zero3", engine=Engine.DEEPSPEED, zero_stage=3, dp_shard=4),
    "fsdp2": Plan(strategy="fsdp2", engine=Engine.FSDP2, dp_shard=4),
    "fsdp2-cp": Plan(strategy="fsdp2", engine=Engine.FSDP2, dp_shard=2, cp=2),
    "zero3-cp": Plan(strategy="zero3", engine=Engine.DEEPSPEED, zero_stage=3, dp_shard=2, cp=2),
}
# By field: another value than the default, and the key that a warning may name it by.
WORKLOAD: Mapping[str, tuple[Any, str]] = {
    "seq_len": (512, "sequence_len: 512"),
    "optimizer": ("paged_adamw_8bit", "optimizer: paged_adamw_8bit"),
    "precision": (Precision.FP32, "bf16"),
    "packing": (False, "sample_packing: false"),
    "adapter": (Lora(), "adapter: lora"),
    "liger": ((LigerKernel.ROPE,), "liger_rope: true"),
    "chunked_loss": (True, "chunked_cross_entropy: true"),
    "activation_offloading": (True, "activation_offloading: true"),
    "fp8": (True, "fp8: true"),
    "fp8_all_gather": (True, "fp8_enable_fsdp_float8_all_gather: true"),
}
LORA: Mapping[str, tuple[Any, str]] = {
    "r": (8, "lora_r: 8"),
    "alpha": (7, "lora_alpha: 7"),
    "dropout": (0.1, "lora_dropout: 0.1"),
    "target_modules": (("q_proj",), "lora_target_modules"),
    "rslora": (True, "peft_use_rslora: true"),
    "dora": (True, "peft_use_dora: true"),
    "base_storage": (BaseStorage.NF4, "adapter: qlora"),
}
TRAIN: Mapping[str, tuple[Any, str]] = {
    "max_steps": (7, "max_steps: 7"),
    "num_epochs": (3.0, "num_epochs: 3.0"),
    "learning_rate": (0.5, "learning_rate: 0.5"),
    "lr_scheduler": ("constant", "lr_scheduler: constant"),
    "warmup_steps": (9, "warmup_steps: 9"),
    "warmup_ratio": (0.1, "warmup_ratio: 0.1"),
    "weight_decay": (0.2, "weight_decay: 0.2"),
    "adam_betas": ((0.8, 0.95), "adam_beta1: 0.8"),
    "adam_epsilon": (1e-6, "adam_epsilon: 1e-06"),
    "max_grad_norm": (0.3, "max_grad_norm: 0.3"),
    "logging_steps": (5, "logging_steps: 5"),
    "eval_batch_size": (4, "eval_batch_size: 4"),
    "eval_steps": (11, "eval_steps: 11"),
    "save_steps": (12, "save_steps: 12"),
    "save_total_limit": (2, "save_total_limit: 2"),
    "val_set_size": (0.1, "val_set_size: 0.1"),
    "use_tensorboard": (True, "use_tensorboard: true"),
    "torch_compile": (True, "torch_compile: true"),
    "resume_from": ("checkpoint-3", "resume_from_checkpoint: checkpoint-3"),
}
DATA: Mapping[str, tuple[Any, str]] = {
    "train_on_inputs": (True, "train_on_inputs: true"),
    "excess_length_strategy": ("truncate", "excess_length_strategy: truncate"),
    "exact_deduplication": (True, "dataset_exact_deduplication: true"),
    "streaming": (True, "streaming: true"),
}
PLAN: Mapping[str, tuple[Any, str]] = {
    "reshard_after_forward": (False, "reshard_after_forward"),
    "offload_optimizer": (True, "offload_optimizer"),
    "offload_params": (True, "offload_params"),
    "cp_backend": (CpBackend.RING, "ring"),
    "heads_k_stride": (2, "heads_k_stride: 2"),
    "micro_batch_size": (2, "micro_batch_size: 2"),
    "grad_accum_steps": (3, "gradient_accumulation_steps: 3"),
    "recompute": (Recompute.FULL, "gradient_checkpointing: true"),
    "bucket_elements": (12_345, "reduce_bucket_size"),
    "hpz": (2, "zero_hpz_partition_size"),
}
# Of one engine, or of plans with `cp` alone; what the others have is no setting.
BELONGS = {
    "reshard_after_forward": ("fsdp2", "fsdp2-cp"),
    "offload_optimizer": ("zero3",),  # FSDP2 offloads both halves together
    "offload_params": ("zero3", "fsdp2"),
    "cp_backend": ("fsdp2-cp", "zero3-cp"),
    "heads_k_stride": ("fsdp2-cp", "zero3-cp"),
    "bucket_elements": ("zero3",),
    "hpz": ("zero3",),
}
NOT_SAID = {
    # Of trials and of our own command alone.
    "mean_document_tokens", "save_final_weights",
    # The layout itself, which tests/conformance/test_export_round_trip.py looks at.
    "strategy", "engine", "zero_stage", "dp_replicate", "dp_shard", "cp", "tp",
    "global_batch_size",
}  # fmt: skip


def job(plan: Plan) -> Job:
    return Job(
        base_model="tiny-qwen3",
        model=MODEL,
        plan=plan,
        workload=Workload(seq_len=1024, global_batch_size=plan.global_batch_size),
        datasets=(DatasetSource(path="corpus.jsonl"),),
    )


def with_adapter(base: Job, **changes: Any) -> Job:
    workload = base.workload.model_copy(update={"adapter": Lora(**changes)})
    return replace(base, workload=workload)


def changed(base: Job, of: str, name: str, value: Any) -> tuple[Job, Job]:
    """Return the job to compare with, and the same with one field changed."""
    if of == "plan":
        changes = {name: value}
        if base.plan.engine is Engine.FSDP2 and name == "offload_params":
            changes["offload_optimizer"] = True
        if name == "heads_k_stride":  # of the ring alone
            base = base.with_plan(replace(base.plan, cp_backend=CpBackend.RING))
        plan = replace(base.plan, **changes)
        update = {"global_batch_size": plan.global_batch_size}
        return base, replace(base, plan=plan, workload=base.workload.model_copy(update=update))
    if of == "lora":
        return with_adapter(base), with_adapter(base, **{name: value})
    held = getattr(base, of)
    return base, replace(base, **{of: held.model_copy(update={name: value})})


def without_comments(done: Exported) -> str:
    text = "\n".join(done.files.values())
    return "\n".join(line for line in text.splitlines() if not line.startswith("#"))


TABLES = {"workload": WORKLOAD, "lora": LORA, "train": TRAIN, "data": DATA, "plan": PLAN}


def silent(engine: str, of: str, name: str, target: str) -> str | None:
    """Return the key that a target drops without a word; None where it does not."""
    value, key = TABLES[of][name]
    base, other = changed(job(PLANS[engine]), of, name, value)
    try:
        after = export(other, target)
        before = export(base, target)
    except AutotuneError:
        return None
    if without_comments(before) != without_comments(after):
        return None
    return None if key in " ".join(after.warnings) else f"{key}: {after.warnings}"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("engine", PLANS)
def test_nothing_is_dropped_in_silence(engine: str, target: str) -> None:
    dropped = [
        silent(engine, of, name, target)
        for of, table in TABLES.items()
        for name in table
        if engine in BELONGS.get(name, PLANS)
    ]
    assert len(dropped) > 40
    assert [each for each in dropped if each] == []


def test_every_field_is_looked_at() -> None:
    known = {name for table in TABLES.values() for name in table} | NOT_SAID
    models = (Workload, Lora, TrainSettings, DataSettings)
    names = {name for model in models for name in model.model_fields}
    assert names | {field.name for field in fields(Plan)} == known


def test_a_dropped_setting_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check above with an accelerate export that says nothing of what is trained."""
    monkeypatch.setattr("autotune.emit.to_accelerate.training_keys", lambda job, said: {})
    assert silent("fsdp2", "train", "weight_decay", "accelerate")
    assert silent("fsdp2", "lora", "dora", "accelerate")
    assert not silent("fsdp2", "plan", "reshard_after_forward", "accelerate")


def test_a_base_in_4_bits_is_loaded_by_every_rank() -> None:
    plain, packed = job(PLANS["fsdp2"]), job(PLANS["fsdp2"])
    packed = with_adapter(packed, base_storage=BaseStorage.NF4)
    for each, expected in ((plain, True), (packed, False)):
        text = next(iter(export(each, "accelerate").files.values()))
        assert f"fsdp_cpu_ram_efficient_loading: {json.dumps(expected)}" in text
