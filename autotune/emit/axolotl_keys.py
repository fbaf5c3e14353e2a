"""What is trained, in Axolotl's keys: shared by `best.yml` and the rewriting of a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from autotune.config.adapters import storage_keys
from autotune.config.kernels import kernel_keys
from autotune.config.layout import RING_FUNCTIONS, Layout
from autotune.plan import CpBackend, Plan
from autotune.spec.training import DatasetSource, DataSettings, TrainSettings
from autotune.spec.workload import Lora, OptimizerName, Precision, Workload


def data_keys(
    datasets: Sequence[DatasetSource],
    test_datasets: Sequence[DatasetSource],
    train: TrainSettings,
) -> dict[str, Any]:
    """Return `datasets`, `test_datasets` and `val_set_size`, where there are any."""
    keys: dict[str, Any] = {}
    if datasets:
        keys["datasets"] = [_dataset(source) for source in datasets]
    if test_datasets:
        keys["test_datasets"] = [_dataset(source) for source in test_datasets]
    if train.val_set_size:
        keys["val_set_size"] = train.val_set_size
    return keys


def _dataset(source: DatasetSource) -> dict[str, Any]:
    return source.model_dump(exclude_none=True)


def data_settings_keys(settings: DataSettings) -> dict[str, Any]:
    """Return what holds for all data sets, where it is not what Axolotl does by itself."""
    keys = settings.model_dump(exclude_defaults=True)
    if "exact_deduplication" in keys:
        keys["dataset_exact_deduplication"] = keys.pop("exact_deduplication")
    return keys


def workload_keys(workload: Workload) -> dict[str, Any]:
    """Return sequence, precision, optimizer and adapter; the global batch is the plan's."""
    keys: dict[str, Any] = {
        "sequence_len": workload.seq_len,
        "sample_packing": workload.packing,
        "bf16": workload.precision is Precision.BF16,
        "optimizer": OPTIMIZER_NAMES[workload.optimizer],
    }
    if workload.adapter:
        keys |= _lora(workload.adapter, workload.precision)
    return keys | kernel_keys(workload)


OPTIMIZER_NAMES: dict[OptimizerName, str] = {
    "adamw": "adamw_torch_fused",
    "sgd": "sgd",
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}
"""What transformers calls an optimizer, and with it Axolotl and LLaMA-Factory."""


def _lora(adapter: Lora, precision: Precision) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "adapter": "qlora" if adapter.base_storage else "lora",
        "lora_r": adapter.r,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "lora_target_modules": list(adapter.target_modules),
    }
    if adapter.rslora:
        keys["peft_use_rslora"] = True
    if adapter.dora:
        keys["peft_use_dora"] = True
    return keys | (storage_keys(adapter.base_storage, precision) if adapter.base_storage else {})


def ring_keys(plan: Plan | Layout, *, packed: bool) -> dict[str, Any]:
    """Return what says that sequences are split by the ring; nothing where Ulysses does it."""
    if plan.cp == 1 or plan.cp_backend is not CpBackend.RING:
        return {}
    keys: dict[str, Any] = {"ring_attn_func": RING_FUNCTIONS[packed]}
    return keys | ({"heads_k_stride": plan.heads_k_stride} if packed else {})


def schedule_keys(train: TrainSettings) -> dict[str, Any]:
    """Return schedule, logging and saving, every value stated."""
    beta1, beta2 = train.adam_betas
    keys = {
        "learning_rate": train.learning_rate,
        "lr_scheduler": train.lr_scheduler,
        "warmup_steps": train.warmup_steps if train.warmup_ratio is None else None,
        "warmup_ratio": train.warmup_ratio,
        "weight_decay": train.weight_decay,
        "adam_beta1": beta1,
        "adam_beta2": beta2,
        "adam_epsilon": train.adam_epsilon,
        "max_grad_norm": train.max_grad_norm,
        "num_epochs": train.num_epochs,
        "max_steps": train.max_steps,
        "logging_steps": train.logging_steps,
        "eval_steps": train.eval_steps,
        "eval_batch_size": train.eval_batch_size,
        "save_steps": train.save_steps,
        "save_total_limit": train.save_total_limit,
        "use_tensorboard": train.use_tensorboard or None,
        "torch_compile": train.torch_compile or None,
        "resume_from_checkpoint": train.resume_from,
    }
    return {key: value for key, value in keys.items() if value is not None}


def yaml_text(keys: Mapping[str, Any]) -> str:
    """Return the keys as YAML, in their order."""
    return yaml.dump(dict(keys), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def comment(lines: Iterable[str]) -> str:
    """Return lines as YAML comments, each on one line whatever it holds."""
    return "".join(f"# {' '.join(line.split())}\n" for line in lines)


class _Dumper(yaml.SafeDumper):
    """Writes text values in full on every platform; never aliases or anchors."""

    def ignore_aliases(self, data: object) -> bool:
        return True
