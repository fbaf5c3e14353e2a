"""A DeepSpeed JSON as Axolotl's keys."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from autotune.config.foreign.translated import Translated
from autotune.config.keys import key_catalogue
from autotune.config.values import Section
from autotune.errors import AutotuneError

_AUTO = "auto"
_SCHEDULES = {
    "WarmupLR": "constant_with_warmup",
    "WarmupDecayLR": "linear",
    "WarmupCosineLR": "cosine",
}
"""DeepSpeed's schedules, and transformers' of the same shape."""
_OPTIMIZERS = {"adam": "adamw_torch_fused", "adamw": "adamw_torch_fused", "sgd": "sgd"}
# What DeepSpeed does with `cp` and `dp` in the JSON: `deepspeed.initialize` makes its mesh of them.
_SEQUENCE_PARALLEL = "sequence_parallel_size"
_DATA_PARALLEL = "data_parallel_size"


def translate_deepspeed(
    values: Mapping[str, Any],
    where: str,
    *,
    hidden_size: int,
    num_gpus: int | None = None,
    accelerate_cp: int | None = None,
) -> Translated:
    """Translate the mapping of a DeepSpeed JSON.

    Args:
        values: The mapping.
        where: What to call it in messages.
        hidden_size: Of the model: a bucket of its square is what "auto" stands for.
        num_gpus: Ranks asked for; None takes them from the batch sizes, where those tell.
        accelerate_cp: Sequence-parallel degree that accelerate's file states; None reads it here.

    Raises:
        AutotuneError: a value of the wrong kind, or batch sizes that contradict each other.
    """
    config = copy.deepcopy(dict(values))
    found = Translated()
    top = Section(config, where)
    cp = accelerate_cp or top.integer(_SEQUENCE_PARALLEL, 1, minimum=1)
    _take_batch(found, config, top, cp, num_gpus)
    if cp > 1:
        found.keys["context_parallel_size"] = cp
    _take_clipping(found, config, top)
    _take_precision(found, top)
    _take_optimizer(found, config, top)
    _take_schedule(found, config, top)
    _take_numerics(found, config, top)
    for key in (_SEQUENCE_PARALLEL, _DATA_PARALLEL):
        config.pop(key, None)
    activations = config.pop("activation_checkpointing", None)
    if activations:
        found.warn_unused(where, ["activation_checkpointing"], "it switches nothing on by itself; "
                          "gradient_checkpointing does")  # fmt: skip
    unknown = [key for key in config if key not in key_catalogue().deepspeed_keys]
    for key in unknown:
        del config[key]
    found.warn_unused(where, unknown, "DeepSpeed does not know it")
    zero = top.section("zero_optimization")
    if zero is None or zero.integer("stage", 0) == 0:
        found.warnings.append(f"{where}: no ZeRO stage: read as DDP.")
        return found
    bucket = zero.raw("reduce_bucket_size")
    if bucket == hidden_size**2:
        config["zero_optimization"]["reduce_bucket_size"] = _AUTO
    found.keys["deepspeed"] = config
    return found


def _take_batch(
    found: Translated, config: dict[str, Any], top: Section, cp: int, asked: int | None
) -> None:
    micro, steps, total = (
        _number(top, key)
        for key in (
            "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size",
        )
    )  # fmt: skip
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
                "train_batch_size"):  # fmt: skip
        config.pop(key, None)
    groups = asked // cp if asked else None
    if groups is None and total and micro and steps and total % (micro * steps) == 0:
        groups = total // (micro * steps)
    if total and groups:
        # DeepSpeed's rule: of the three sizes and the ranks, the missing one follows.
        if micro is None and steps is not None:
            micro = _divide(top, total, steps * groups)
        elif steps is None and micro is not None:
            steps = _divide(top, total, micro * groups)
        elif micro is None and steps is None:
            steps = 1
            micro = _divide(top, total, groups)
    stated = None
    if total and micro and steps:
        stated = _divide(top, total, micro * steps) * cp
    found.set_ranks(top.where, stated, asked)
    if micro is not None:
        found.keys["micro_batch_size"] = micro
    if steps is not None:
        found.keys["gradient_accumulation_steps"] = steps


def _number(top: Section, key: str) -> int | None:
    return None if top.raw(key, _AUTO) == _AUTO else top.integer(key, minimum=1)


def _divide(top: Section, total: int, divisor: int) -> int:
    if total % divisor:
        raise top.error("train_batch_size", "DeepSpeed's rule: train_micro_batch_size_per_gpu x "
                        "gradient_accumulation_steps x data-parallel ranks make it.")  # fmt: skip
    return total // divisor


def _take_clipping(found: Translated, config: dict[str, Any], top: Section) -> None:
    if top.raw("gradient_clipping", _AUTO) != _AUTO:
        found.keys["max_grad_norm"] = top.number("gradient_clipping", 0.0)
    config.pop("gradient_clipping", None)


def _take_precision(found: Translated, top: Section) -> None:
    fp16 = top.section("fp16")
    if fp16 and fp16.raw("enabled") is True:
        raise fp16.error("enabled", "fp16 is not run here: use bf16.")
    block = top.section("bf16") or top.section("bfloat16")
    enabled = block.raw("enabled", False) if block else None
    auto = enabled == _AUTO or (fp16 is not None and fp16.raw("enabled") == _AUTO)
    if enabled is None and not auto:
        found.warnings.append(f"{top.where}: no bf16 block: DeepSpeed then runs fp32, read so.")
    found.keys["bf16"] = True if auto else bool(enabled)


def _take_optimizer(found: Translated, config: dict[str, Any], top: Section) -> None:
    block = top.section("optimizer")
    config.pop("optimizer", None)
    if block is None:
        return
    kind = block.text("type", "AdamW")
    if kind.lower() not in _OPTIMIZERS:
        raise block.error("type", "Allowed: Adam, AdamW, SGD.")
    found.keys["optimizer"] = _OPTIMIZERS[kind.lower()]
    params = block.section("params")
    if params is None:
        return
    for theirs, ours in (("lr", "learning_rate"), ("eps", "adam_epsilon"),
                         ("weight_decay", "weight_decay")):  # fmt: skip
        if params.raw(theirs, _AUTO) != _AUTO:
            found.keys[ours] = params.number(theirs)
    betas = params.raw("betas", _AUTO)
    if isinstance(betas, list) and len(betas) == 2:
        found.keys["adam_beta1"], found.keys["adam_beta2"] = betas
    found.warn_unused(params.where, list(params.unread()), "the optimizer here has no such setting")


def _take_schedule(found: Translated, config: dict[str, Any], top: Section) -> None:
    block = top.section("scheduler")
    config.pop("scheduler", None)
    if block is None:
        return
    kind = block.text("type", "")
    if kind not in _SCHEDULES:
        found.warn_unused(block.where, ["type"], f"{kind} has no counterpart: cosine is used")
        return
    found.keys["lr_scheduler"] = _SCHEDULES[kind]
    params = block.section("params")
    if params is None:
        return
    if params.raw("warmup_num_steps", _AUTO) != _AUTO:
        found.keys["warmup_steps"] = params.integer("warmup_num_steps")
    if params.raw("warmup_max_lr", _AUTO) != _AUTO and "learning_rate" not in found.keys:
        found.keys["learning_rate"] = params.number("warmup_max_lr")
    unused = [key for key, value in params.unread().items() if value != _AUTO]
    found.warn_unused(params.where, unused, "the schedule here has no such setting")


def _take_numerics(found: Translated, config: dict[str, Any], top: Section) -> None:
    """Drop what asks for other numerics than every run here has."""
    types = config.get("data_types")
    lower = isinstance(types, Mapping) and types.get("grad_accum_dtype", "fp32") not in (
        "fp32", None,
    )  # fmt: skip
    if lower:
        del config["data_types"]["grad_accum_dtype"]
        found.warn_unused(top.where, ["data_types.grad_accum_dtype"], "gradients are accumulated "
                          "in fp32")  # fmt: skip
    if config.get("communication_data_type", "fp32") not in ("fp32", None):
        del config["communication_data_type"]
        found.warn_unused(top.where, ["communication_data_type"], "gradients are reduced in fp32")


def mapping_of_fields(fields: Section) -> dict[str, Any]:
    """Return the DeepSpeed mapping that accelerate builds from the fields of its own file.

    Source: `accelerate.utils.DeepSpeedPlugin`, without a config file.
    """
    zero: dict[str, Any] = {"stage": fields.integer("zero_stage", 2)}
    for theirs, ours in (("offload_optimizer_device", "offload_optimizer"),
                         ("offload_param_device", "offload_param")):  # fmt: skip
        device = fields.text(theirs, "none")
        if device != "none":
            zero[ours] = {"device": device}
    mapping: dict[str, Any] = {"zero_optimization": zero}
    mapping["gradient_accumulation_steps"] = fields.raw("gradient_accumulation_steps", 1)
    clipping = fields.raw("gradient_clipping")
    if clipping not in (None, "none"):
        mapping["gradient_clipping"] = clipping
    return mapping


def refuse_fields_beside_file(fields: Section) -> None:
    """Refuse what accelerate refuses beside `deepspeed_config_file`.

    Raises:
        AutotuneError: names the keys.
    """
    both = [key for key in ("gradient_accumulation_steps", "gradient_clipping", "zero_stage",
                            "offload_optimizer_device", "offload_param_device",
                            "zero3_save_16bit_model") if fields.has(key)]  # fmt: skip
    if both:
        raise AutotuneError(
            f"{fields.where}: {', '.join(both)} beside deepspeed_config_file: accelerate refuses "
            "that. Say it in the DeepSpeed file alone."
        )
