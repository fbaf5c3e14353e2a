"""Optimizer, adapter and schedule keys of a configuration."""

from __future__ import annotations

from collections.abc import Callable

from autotune.config.deepspeed import EngineSettings
from autotune.config.values import Section
from autotune.errors import AutotuneError
from autotune.spec.training import TrainSettings
from autotune.spec.workload import OptimizerName, Precision

OPTIMIZERS: dict[str, OptimizerName] = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "sgd": "sgd",
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw_8bit": "adamw_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}
"""Axolotl's optimizer names that run here. Fused or not is decided by the engine and device."""

# `SchedulerType` of transformers, less those that need further arguments or an evaluation.
SCHEDULERS = (
    "cosine", "linear", "constant", "constant_with_warmup", "inverse_sqrt", "polynomial",
    "cosine_with_restarts",
)  # fmt: skip
_RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    ("adam_beta1", lambda beta: beta < 1, "Write a number from 0 to below 1."),
    ("adam_beta2", lambda beta: beta < 1, "Write a number from 0 to below 1."),
    ("warmup_ratio", lambda share: share <= 1, "Write a share of the steps, from 0 to 1."),
    ("num_epochs", lambda epochs: epochs > 0, "Write a number above 0."),
    (
        "val_set_size",
        lambda size: size < 1 or size == int(size),
        "Write a share below 1, or a whole number of sequences.",
    ),
)
DEFAULT_MAX_GRAD_NORM = 1.0  # transformers.TrainingArguments


def read_optimizer(top: Section) -> OptimizerName:
    """Read `optimizer`; Axolotl's default is `adamw_torch_fused`."""
    return OPTIMIZERS[top.text("optimizer", "adamw_torch_fused", choices=tuple(OPTIMIZERS))]


def read_precision(top: Section) -> Precision:
    """Read `bf16` and its relatives; Axolotl's `bf16: auto` default means bf16 here.

    Raises:
        AutotuneError: fp16, or weights held in half precision without an fp32 master copy.
    """
    for key in ("fp16", "float16", "bfloat16"):
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


def read_torch_compile(top: Section, engine: EngineSettings) -> bool:
    """Read `torch_compile`; Axolotl's "auto" means true on every torch that runs here.

    Raises:
        AutotuneError: the DeepSpeed mapping asks for what the file forbids, ZeRO-3, or tensor
            parallelism.
    """
    top.text("torch_compile_backend", choices=("inductor",))
    given = top.raw("torch_compile")
    if given not in (None, True, False, "auto"):
        raise top.error("torch_compile", "Write true, false or auto.")
    if given is False and engine.torch_compile:
        raise top.error("torch_compile", "The DeepSpeed file asks for it: use the file without.")
    compiled = bool(given) or engine.torch_compile
    if compiled and top.integer("tensor_parallel_size", 1, minimum=1) > 1:
        raise AutotuneError(
            f"{top.where}: torch_compile with tensor_parallel_size above 1 was never run here. "
            "Remove one of them."
        )
    if compiled and engine.sharding.zero_stage == 3:
        # dynamo traces DeepSpeed's gathering hooks of every module until it gives up (0.19.8).
        raise AutotuneError(
            f"{top.where}: torch_compile does not run with ZeRO-3 here. Use FSDP2 or ZeRO-2, or "
            "remove torch_compile."
        )
    return compiled


def read_train_settings(
    top: Section, *, max_grad_norm: float | None, torch_compile: bool, where: str
) -> TrainSettings:
    """Read schedule, logging and saving keys.

    Args:
        top: The whole file.
        max_grad_norm: Clipping where the file states it (there or in a DeepSpeed JSON).
        torch_compile: Likewise.
        where: What to call the file in messages.

    Raises:
        AutotuneError: a value of the wrong kind, or `learning_rate` missing.
    """
    learning_rate = top.number("learning_rate")
    if learning_rate is None:
        raise AutotuneError(f"{where}: learning_rate is missing. Axolotl has no default for it.")
    if top.has("warmup_steps") and top.has("warmup_ratio"):
        raise AutotuneError(f"{where}: warmup_steps and warmup_ratio exclude each other.")
    for key, holds, allowed in _RANGES:
        value = top.number(key)
        if value is not None and not holds(value):
            raise top.error(key, allowed)
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
        eval_batch_size=top.integer("eval_batch_size", minimum=1),
        save_steps=top.integer("save_steps", minimum=1),
        save_total_limit=top.integer("save_total_limit", minimum=1),
        val_set_size=top.number("val_set_size", 0.0),
        use_tensorboard=top.boolean("use_tensorboard", False),
        torch_compile=torch_compile,
        resume_from=top.text("resume_from_checkpoint"),
    )
