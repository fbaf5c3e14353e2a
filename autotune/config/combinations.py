"""Keys of an Axolotl file that do not go together on several ranks: a rule each, with its code.

Axolotl 0.19 checks most of them (schemas/validation.py); what it lets pass fails later, or does
nothing.
`autotune explain CODE` says more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from autotune.errors import AutotuneError

_Broken = tuple[str, str] | None
"""What was given, and what to do; None when the rule holds."""


def check_combinations(values: Mapping[str, Any], where: str) -> None:
    """Refuse what does not go together.

    Args:
        values: The keys of a file, in today's spelling.
        where: What to call the file.

    Raises:
        AutotuneError: with the code of the first rule that is broken.
    """
    for code, rule in FILE_RULES.items():
        if broken := rule(values):
            raise AutotuneError(f"{where}: [{code}] {broken[0]} {broken[1]}")


def _two_engines(values: Mapping[str, Any]) -> _Broken:
    if values.get("deepspeed") is None or not (values.get("fsdp") or values.get("fsdp_config")):
        return None
    return (
        "deepspeed and fsdp_config exclude each other (Axolotl would drop deepspeed in silence).",
        "Remove one of them.",
    )


def _needs_fsdp2(values: Mapping[str, Any]) -> _Broken:
    keys = ("fp32_norms", "fp8_enable_fsdp_float8_all_gather")
    given = [key for key in keys if values.get(key)]
    config = values.get("fsdp_config")
    versions = [values.get("fsdp_version")]
    if isinstance(config, Mapping):
        versions += [config.get("fsdp_version"), config.get("version")]
    if not given or (config and 2 in versions):
        return None
    return (f"{' and '.join(given)} belongs to FSDP2.", "Add fsdp_version: 2 with fsdp_config.")


def _selects_what_is_kept(values: Mapping[str, Any]) -> _Broken:
    # Activation offloading without it is AT139.
    if not values.get("selective_checkpointing") or values.get("gradient_checkpointing"):
        return None
    return (
        "selective_checkpointing without gradient_checkpointing: there is nothing to keep less of.",
        "Add gradient_checkpointing: true.",
    )


def _compiles_nothing(values: Mapping[str, Any]) -> _Broken:
    keys = ("torch_compile_mode", "torch_compile_options")
    given = [key for key in keys if values.get(key)]
    if not given or values.get("torch_compile"):
        return None
    return (f"{' and '.join(given)} without torch_compile.", "Add torch_compile: true, or remove.")


def _deepcompile(values: Mapping[str, Any]) -> _Broken:
    if not values.get("deepcompile") or values.get("deepspeed") is not None:
        return None
    return ("deepcompile without deepspeed.", "Use torch_compile: true, or add deepspeed.")


def _restarts_sharded(values: Mapping[str, Any]) -> _Broken:
    sharded = [key for key in ("deepspeed", "fsdp", "fsdp_config") if values.get(key)]
    if not values.get("relora") or not sharded:
        return None
    return (
        f"relora with {sharded[0]}: restarting resets optimizer states that other ranks hold.",
        "Use adapter: lora without relora, or DDP.",
    )


def _one_device_a_rank(values: Mapping[str, Any]) -> _Broken:
    sharded = [key for key in ("deepspeed", "fsdp", "fsdp_config") if values.get(key)]
    given = [key for key in ("device_map", "max_memory", "gpu_memory_limit") if values.get(key)]
    if not sharded or not given:
        return None
    return (
        f"{' and '.join(given)} with {sharded[0]}: it spreads one model over the devices of one "
        "process, and a rank has one device.",
        "Remove it: the engine shards.",
    )


def _expert_parallel(values: Mapping[str, Any]) -> _Broken:
    size = values.get("expert_parallel_size")
    if size in (None, 1):
        return None
    return (
        f"expert_parallel_size: {size}: experts are not spread over ranks here, so another layout "
        "would train than the file says.",
        "Use 1: ZeRO-3 and FSDP2 shard the experts' parameters with the others.",
    )


FILE_RULES: dict[str, Callable[[Mapping[str, Any]], _Broken]] = {
    "AT151": _two_engines,
    "AT152": _needs_fsdp2,
    "AT153": _selects_what_is_kept,
    "AT154": _compiles_nothing,
    "AT155": _deepcompile,
    "AT156": _restarts_sharded,
    "AT157": _one_device_a_rank,
    "AT158": _expert_parallel,
}
