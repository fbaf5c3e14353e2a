"""The keys of an adapter and of the storage of its frozen base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autotune.config.values import Section
from autotune.errors import AutotuneError
from autotune.spec.workload import BaseStorage, Lora, Precision

LORA_KEYS = (
    "lora_r", "lora_alpha", "lora_dropout", "lora_target_linear", "lora_target_modules",
    "peft_use_rslora", "peft_use_dora", "bnb_config_kwargs",
)  # fmt: skip
"""Read with an adapter; without one they do nothing."""
_ALL_LINEAR = "all-linear"  # PEFT's word for lora_target_linear
_BNB_TYPE, _BNB_DOUBLE = "bnb_4bit_quant_type", "bnb_4bit_use_double_quant"
_BNB_STORAGE, _BNB_COMPUTE = "bnb_4bit_quant_storage", "bnb_4bit_compute_dtype"


def read_adapter(
    top: Section, where: str, linears: tuple[str, ...], precision: Precision
) -> Lora | None:
    """Read the LoRA keys; None without `adapter`.

    Args:
        top: The whole file.
        where: What to call the file in messages.
        linears: The model's projections, which `lora_target_linear` means.
        precision: What the run computes in, which 4-bit weights are stored in elements of.

    Raises:
        AutotuneError: another adapter, other quantised weights than nf4, or rank or targets not
            given.
    """
    for key in ("load_in_8bit", "gptq"):
        if top.raw(key):
            raise top.error(key, "The base runs in 4 bits (adapter: qlora with load_in_4bit: true)"
                            " or as it is: remove it.")  # fmt: skip
    adapter = top.text("adapter", choices=("lora", "qlora"))
    in_4bit = top.boolean("load_in_4bit", False)
    if adapter is None:
        if in_4bit:
            raise top.error("load_in_4bit", "Weights in 4 bits cannot be trained themselves: add "
                            "adapter: qlora, or remove it.")  # fmt: skip
        return None  # whatever lora_ keys are left over stay as they are
    if adapter == "qlora" and not in_4bit:
        raise AutotuneError(f"{where}: adapter: qlora needs load_in_4bit: true.")
    rank = top.integer("lora_r", minimum=1)
    alpha = top.integer("lora_alpha", minimum=1)
    dropout = top.number("lora_dropout", 0.0)
    if rank is None or alpha is None:
        raise AutotuneError(f"{where}: adapter: {adapter} needs lora_r and lora_alpha.")
    if dropout >= 1:
        raise top.error("lora_dropout", "Write a number below 1.")
    return Lora(
        r=rank,
        alpha=alpha,
        dropout=dropout,
        target_modules=_read_targets(top, adapter, linears),
        rslora=top.boolean("peft_use_rslora", False),
        dora=top.boolean("peft_use_dora", False),
        base_storage=_read_storage(top, precision) if in_4bit else None,
    )


def _read_targets(top: Section, adapter: str, linears: tuple[str, ...]) -> tuple[str, ...]:
    linear = top.boolean("lora_target_linear", False)
    targets = top.raw("lora_target_modules")
    if targets == _ALL_LINEAR:
        targets, linear = [], True
    targets = [targets] if isinstance(targets, str) else targets or []
    if not targets and not linear:
        raise AutotuneError(
            f"{top.where}: adapter: {adapter} needs lora_target_modules, or "
            "lora_target_linear: true."
        )
    if not isinstance(targets, list) or not all(_is_module_name(name) for name in targets):
        raise top.error("lora_target_modules", "Write a list of module names, such as "
                        "[q_proj, v_proj]; patterns are not read here.")  # fmt: skip
    # With lora_target_linear Axolotl adds the linear layers to those that are named.
    named = [*linears, *targets] if linear else targets
    return tuple(dict.fromkeys(named))


def _read_storage(top: Section, precision: Precision) -> BaseStorage:
    """Read `bnb_config_kwargs`; Axolotl's defaults are nf4 and double quantisation.

    Raises:
        AutotuneError: fp4, or a storage or compute type that is not the run's compute type.
    """
    given = top.raw("bnb_config_kwargs")
    if given is not None and not isinstance(given, Mapping):
        raise top.error("bnb_config_kwargs", "Write a mapping of keys to values.")
    told: Mapping[str, Any] = given or {}
    compute = "bfloat16" if precision is Precision.BF16 else "float32"
    allowed: dict[str, tuple[object, ...]] = {
        _BNB_TYPE: ("nf4",), _BNB_DOUBLE: (True, False),
        _BNB_STORAGE: (compute,), _BNB_COMPUTE: (compute,),
    }  # fmt: skip
    for key, value in told.items():
        if key not in allowed:
            raise top.error("bnb_config_kwargs", f"Keys that are read here: {', '.join(allowed)}.")
        if value not in allowed[key]:
            why = ""
            if key in (_BNB_STORAGE, _BNB_COMPUTE):
                why = ", the type the run computes in: FSDP2 shards weights in that type alone"
            raise top.error("bnb_config_kwargs",
                            f"{key} may be {_words(allowed[key])}{why}.")  # fmt: skip
    return BaseStorage.NF4_DOUBLE if told.get(_BNB_DOUBLE, True) else BaseStorage.NF4


def storage_keys(storage: BaseStorage, precision: Precision) -> dict[str, Any]:
    """Return the keys that `read_adapter` reads back, valid in Axolotl."""
    compute = "bfloat16" if precision is Precision.BF16 else "float32"
    return {
        "load_in_4bit": True,
        "bnb_config_kwargs": {
            _BNB_TYPE: "nf4",
            _BNB_DOUBLE: storage is BaseStorage.NF4_DOUBLE,
            _BNB_STORAGE: compute,
        },
    }


def _words(values: tuple[object, ...]) -> str:
    return " or ".join(str(v).lower() if isinstance(v, bool) else str(v) for v in values)


def _is_module_name(name: object) -> bool:
    return isinstance(name, str) and name.replace("_", "").replace(".", "").isalnum()
