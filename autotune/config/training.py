"""Data, optimizer, adapter and schedule keys of a configuration."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from autotune.config.keys import check_known, key_catalogue
from autotune.config.values import Section
from autotune.errors import AutotuneError
from autotune.spec.training import DatasetSource, TrainSettings
from autotune.spec.workload import Lora, Precision

OPTIMIZERS: dict[str, Literal["adamw", "sgd"]] = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "sgd": "sgd",
}
"""Axolotl's optimizer names that run here. Fused or not is decided by the engine and device."""

# `SchedulerType` of transformers, less those that need further arguments or an evaluation.
SCHEDULERS = (
    "cosine", "linear", "constant", "constant_with_warmup", "inverse_sqrt", "polynomial",
    "cosine_with_restarts",
)  # fmt: skip
DATASET_TYPES = ("completion", "alpaca", "chat_template")
_USED_DATASET_KEYS = frozenset({"path", "type", "ds_type", "field", "field_messages", "split"})
DEFAULT_MAX_GRAD_NORM = 1.0  # transformers.TrainingArguments


def read_optimizer(top: Section) -> Literal["adamw", "sgd"]:
    """Read `optimizer`; Axolotl's default is `adamw_torch_fused`."""
    return OPTIMIZERS[top.text("optimizer", "adamw_torch_fused", choices=tuple(OPTIMIZERS))]


def read_precision(top: Section) -> Precision:
    """Read `bf16` and its relatives; Axolotl's `bf16: auto` default means bf16 here.

    Raises:
        AutotuneError: fp16, or weights held in half precision without an fp32 master copy.
    """
    for key in ("fp16", "float16", "bfloat16", "fp8"):
        if top.raw(key):
            raise top.error(key, "Runs here keep fp32 master weights and compute in bf16 "
                            "(`bf16: true`) or fp32 (`bf16: false`).")  # fmt: skip
    bf16 = top.raw("bf16", "auto")
    if bf16 != "auto" and not isinstance(bf16, bool):
        raise top.error("bf16", "Write true, false or auto.")
    if top.boolean("float32", False):
        if bf16 is True:
            raise top.error("float32", "It contradicts bf16: true. Keep one of them.")
        return Precision.FP32
    return Precision.BF16 if bf16 else Precision.FP32


def read_adapter(top: Section, where: str, linears: tuple[str, ...]) -> Lora | None:
    """Read the LoRA keys; None without `adapter`.

    Args:
        top: The whole file.
        where: What to call the file in messages.
        linears: The model's projections, which `lora_target_linear` means.

    Raises:
        AutotuneError: another adapter, quantised weights, or rank or targets not given.
    """
    for key in ("load_in_4bit", "load_in_8bit", "gptq"):
        if top.raw(key):
            raise top.error(key, "Quantised base weights are not run here yet: remove it and "
                            "use adapter: lora.")  # fmt: skip
    adapter = top.text("adapter", choices=("lora",))
    rank = top.integer("lora_r", minimum=1)
    alpha = top.integer("lora_alpha", minimum=1)
    dropout = top.number("lora_dropout", 0.0)
    linear = top.boolean("lora_target_linear", False)
    targets = top.raw("lora_target_modules")
    if adapter is None:
        return None
    if rank is None or alpha is None:
        raise AutotuneError(f"{where}: adapter: lora needs lora_r and lora_alpha.")
    if dropout >= 1:
        raise top.error("lora_dropout", "Write a number below 1.")
    if isinstance(targets, str):
        targets = [targets]
    if not targets:
        if not linear:
            raise AutotuneError(
                f"{where}: adapter: lora needs lora_target_modules, or lora_target_linear: true."
            )
        targets = list(linears)
    if not isinstance(targets, list) or not all(_is_module_name(name) for name in targets):
        raise top.error("lora_target_modules", "Write a list of module names, such as "
                        "[q_proj, v_proj]; patterns are not read here.")  # fmt: skip
    return Lora(r=rank, alpha=alpha, dropout=dropout, target_modules=tuple(targets))


def read_train_settings(top: Section, *, max_grad_norm: float | None, where: str) -> TrainSettings:
    """Read schedule, logging and saving keys.

    Args:
        top: The whole file.
        max_grad_norm: Clipping where the file states it (there or in a DeepSpeed JSON).
        where: What to call the file in messages.

    Raises:
        AutotuneError: a value of the wrong kind, or `learning_rate` missing.
    """
    learning_rate = top.number("learning_rate")
    if learning_rate is None:
        raise AutotuneError(f"{where}: learning_rate is missing. Axolotl has no default for it.")
    if top.has("warmup_steps") and top.has("warmup_ratio"):
        raise AutotuneError(f"{where}: warmup_steps and warmup_ratio exclude each other.")
    return TrainSettings(
        max_steps=top.integer("max_steps", minimum=1),
        num_epochs=top.number("num_epochs", 1.0),
        learning_rate=learning_rate,
        lr_scheduler=top.text("lr_scheduler", "cosine", choices=SCHEDULERS),
        warmup_steps=top.integer("warmup_steps", 0),
        warmup_ratio=top.number("warmup_ratio"),
        weight_decay=top.number("weight_decay", 0.0),
        adam_betas=(top.number("adam_beta1", 0.9), top.number("adam_beta2", 0.999)),
        adam_epsilon=top.number("adam_epsilon", 1e-8),
        max_grad_norm=DEFAULT_MAX_GRAD_NORM if max_grad_norm is None else max_grad_norm,
        logging_steps=top.integer("logging_steps", 1, minimum=1),
        eval_steps=top.integer("eval_steps", minimum=1),
        save_steps=top.integer("save_steps", minimum=1),
        save_total_limit=top.integer("save_total_limit", minimum=1),
        val_set_size=top.number("val_set_size", 0.0),
        use_tensorboard=top.boolean("use_tensorboard", False),
        resume_from=top.text("resume_from_checkpoint"),
    )


def read_datasets(
    top: Section, key: str, folder: Path, where: str
) -> tuple[list[DatasetSource], list[str]]:
    """Read `datasets` or `test_datasets`, with the warnings for keys that are not used.

    A relative path is taken from the working directory, as Axolotl does, or else from the
    configuration's folder when the file is there.

    Raises:
        AutotuneError: no list of mappings, an unknown key, or a type that is not read here.
    """
    entries = top.raw(key, [])
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise top.error(key, "Write a list of entries, each with path and type.")
    sources: list[DatasetSource] = []
    warnings: list[str] = []
    for index, entry in enumerate(entries):
        place = f"{where}: {key}[{index}]"
        check_known(entry, key_catalogue().dataset_keys, place)
        unused = sorted(name for name, value in entry.items()
                        if value is not None and name not in _USED_DATASET_KEYS)  # fmt: skip
        if unused:
            # Every one of them changes what is trained on.
            raise AutotuneError(
                f"{place}: {', '.join(unused)} {'is' if len(unused) == 1 else 'are'} not used "
                f"here yet. Allowed: {', '.join(sorted(_USED_DATASET_KEYS))}."
            )
        sources.append(_dataset(Section(entry, place), entry, folder))
    return sources, warnings


def _dataset(section: Section, entry: Mapping[str, Any], folder: Path) -> DatasetSource:
    path = section.text("path")
    if path is None:
        raise AutotuneError(f"{section.where} has no path. Give the path of a data file.")
    if not os.path.exists(path) and (folder / path).exists():
        path = str(folder / path)
    kind = section.text("type", "completion", choices=DATASET_TYPES)
    named = {name: section.text(name) for name in ("ds_type", "field", "field_messages")}
    split = section.text("split", "train")
    return DatasetSource(path=path, type=kind, split=split, **named, **section.unread())


def _is_module_name(name: object) -> bool:
    return isinstance(name, str) and name.replace("_", "").replace(".", "").isalnum()
