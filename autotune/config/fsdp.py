"""FSDP of a configuration: `fsdp_config` for FSDP2, and every spelling of FSDP1 that means one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autotune.config.keys import check_known, key_catalogue
from autotune.config.sharding import Sharding
from autotune.config.values import Section
from autotune.errors import AutotuneError, nearest
from autotune.plan import Engine

# Source: Accelerate's guide from FSDP1 to FSDP2.
STRATEGIES = {
    "full_shard": (True, False),
    "shard_grad_op": (False, False),
    "hybrid_shard": (True, True),
    "hybrid_shard_zero2": (False, True),
}
"""FSDP1's strategies as (reshard_after_forward, copies between nodes)."""
NO_SHARD = "no_shard"
_WORDS = (*STRATEGIES, NO_SHARD, "auto_wrap", "offload")
_NUMBERED = ("full_shard", "shard_grad_op", NO_SHARD, "hybrid_shard", "hybrid_shard_zero2")
"""torch's `ShardingStrategy` by number, from 1."""
VERSION_KEYS = ("fsdp_version", "version")


@dataclass(frozen=True, kw_only=True, slots=True)
class FsdpKeys:
    """What a file's FSDP keys say, in whichever spelling."""

    section: Section
    """`fsdp_config` without prefixes."""
    values: Mapping[str, Any]
    """The same as plain values, null ones included."""
    version: int | None
    """None where nothing names one, which Axolotl takes for 1."""
    reshard: bool
    offload: bool
    hybrid: bool
    """The list `fsdp` names a strategy with copies between nodes."""


def read_fsdp_keys(top: Section, where: str) -> FsdpKeys | None:
    """Read the FSDP keys without asking whether they run here; None when there is no FSDP.

    Raises:
        AutotuneError: an unknown key, a contradiction, or an FSDP1 strategy that FSDP2 lacks.
    """
    words = _listed(top)
    version = top.integer("fsdp_version")
    section = top.section("fsdp_config")
    values = _without_prefix(section) if section else {}
    if not values and not words:
        if version is not None:
            raise AutotuneError(
                f"{where}: fsdp_version is set but fsdp_config is empty, so nothing would be "
                "sharded. Add fsdp_config (for example reshard_after_forward: true) or remove it."
            )
        return None
    catalogue = key_catalogue()
    place = f"{where}: fsdp_config"
    check_known(values, catalogue.fsdp_keys | set(catalogue.fsdp1_keys), place)
    fsdp = Section(values, place)
    return FsdpKeys(
        section=fsdp,
        values=values,
        version=_version(fsdp, version, where),
        reshard=_reshard(fsdp, words, where),
        offload=_offload(fsdp, words, where),
        hybrid=any(STRATEGIES[word][1] for word in words if word in STRATEGIES),
    )


def read_fsdp(top: Section, where: str) -> Sharding | None:
    """Read `fsdp_config`, `fsdp_version` and the FSDP1 list `fsdp`; None when there is no FSDP.

    FSDP1 runs as FSDP2 where FSDP2 has a setting of the same meaning; a warning says so and names
    every key that is dropped.

    Raises:
        AutotuneError: an unknown key, a contradiction, or a setting without a counterpart here.
    """
    keys = read_fsdp_keys(top, where)
    if keys is None:
        return None
    fsdp, reshard, offload = keys.section, keys.reshard, keys.offload
    catalogue = key_catalogue()
    recompute = fsdp.boolean("activation_checkpointing", False)
    _check_kept(fsdp, offload)
    config = {"reshard_after_forward": reshard, "offload_params": offload}
    if recompute:
        config["activation_checkpointing"] = True
    config |= {key: value for key, value in keys.values.items()
               if value is not None and key not in catalogue.fsdp1_keys
               and key not in VERSION_KEYS}  # fmt: skip
    warnings = []
    if keys.version != 2:
        said = f"fsdp_version {keys.version}" if keys.version else "fsdp_version is not set"
        warnings.append(
            f"{where}: this is FSDP1 ({said}). It runs as FSDP2 with reshard_after_forward: "
            f"{str(reshard).lower()} and offload_params: {str(offload).lower()}; write "
            "fsdp_version: 2 and these two into fsdp_config, as 'autotune migrate' does."
        )
    warnings += _dropped(top, fsdp, reshard, fsdp.where)
    return Sharding(
        engine=Engine.FSDP2,
        reshard_after_forward=reshard,
        # CPUOffloadPolicy keeps parameters, gradients and optimizer states on the host together.
        offload_optimizer=offload,
        offload_params=offload,
        activation_checkpointing=recompute,
        config=config,
        warnings=tuple(warnings),
    )


def _listed(top: Section) -> tuple[str, ...]:
    """Return the words of `fsdp:`, a list or (as transformers takes it) one text."""
    given = top.raw("fsdp", [])
    words = re.split(r"[\s,]+", given.strip()) if isinstance(given, str) else given
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise top.error("fsdp", "Write fsdp_version: 2 with fsdp_config instead.")
    words = [word.lower() for word in words if word]
    for word in words:
        if word not in _WORDS:
            raise top.error("fsdp", f"Known: {', '.join(_WORDS)}.{nearest(word, _WORDS, 1)}")
    if NO_SHARD in words:
        raise top.error("fsdp", "FSDP2 has no counterpart of no_shard: it is DDP. Remove fsdp and "
                                "fsdp_config.")  # fmt: skip
    if sum(word in STRATEGIES for word in set(words)) > 1:
        raise top.error("fsdp", "Name one strategy alone.")
    if any(STRATEGIES[word][1] for word in words if word in STRATEGIES) and not (
        top.has("dp_replicate_size") or top.has("dp_shard_size")
    ):
        raise top.error("fsdp", "FSDP2 must be told the copies of a hybrid strategy: add "
                        "dp_replicate_size (nodes) and dp_shard_size (GPUs a node), or let "
                        "'autotune migrate --gpus N --nodes M' write them.")  # fmt: skip
    return tuple(words)


def _without_prefix(section: Section) -> dict[str, Any]:
    """Return the keys without `fsdp_`, which Axolotl takes off, too."""
    values: dict[str, Any] = {}
    for key, value in section.unread().items():
        bare = key if key in VERSION_KEYS else key.removeprefix("fsdp_")
        if values.get(bare) is not None and value is not None and values[bare] != value:
            raise AutotuneError(
                f"{section.where}: {bare} and fsdp_{bare} contradict each other. Keep {bare}."
            )
        if values.get(bare) is None:
            values[bare] = value
    return values


def _version(fsdp: Section, outer: int | None, where: str) -> int | None:
    found = {outer, *(fsdp.integer(key) for key in VERSION_KEYS)} - {None}
    if len(found) > 1:
        raise AutotuneError(
            f"{where}: fsdp_version and the version in fsdp_config contradict each other. Keep "
            "fsdp_version: 2."
        )
    version = found.pop() if found else None
    if version not in (None, 1, 2):
        raise AutotuneError(f"{where}: fsdp_version: {version} is not allowed here. Write 2.")
    return version


def _reshard(fsdp: Section, words: tuple[str, ...], where: str) -> bool:
    stated = fsdp.boolean("reshard_after_forward", True)
    listed = next((word for word in words if word in STRATEGIES), None)
    if listed is None:
        return stated
    reshard, _ = STRATEGIES[listed]
    if fsdp.has("reshard_after_forward") and stated is not reshard:
        raise AutotuneError(
            f"{where}: fsdp: {listed} and fsdp_config: reshard_after_forward: "
            f"{str(stated).lower()} contradict each other. Remove fsdp."
        )
    return reshard


def _offload(fsdp: Section, words: tuple[str, ...], where: str) -> bool:
    stated = fsdp.boolean("offload_params", False)
    if "offload" in words and fsdp.has("offload_params") and not stated:
        raise AutotuneError(
            f"{where}: fsdp: offload and fsdp_config: offload_params: false contradict each "
            "other. Remove fsdp."
        )
    return stated or "offload" in words


def _check_kept(fsdp: Section, offload: bool) -> None:
    """Check the settings that hold here whatever the file says, or that only Axolotl uses."""
    fsdp.text("auto_wrap_policy", choices=("TRANSFORMER_BASED_WRAP",))
    for key in ("state_dict_type", "final_state_dict_type"):
        fsdp.text(key, choices=("SHARDED_STATE_DICT", "FULL_STATE_DICT"))
    fsdp.text("transformer_layer_cls_to_wrap")
    fsdp.boolean("cpu_ram_efficient_loading", True)
    pinned = fsdp.boolean("cpu_offload_pin_memory", True)
    if not offload and not pinned:
        raise fsdp.error("cpu_offload_pin_memory", "It needs offload_params: true.")


def _dropped(top: Section, fsdp: Section, reshard: bool, place: str) -> list[str]:
    """Return the warnings that name each key without a meaning here."""
    reasons = key_catalogue().fsdp1_keys
    unread = {key: value for key, value in fsdp.unread().items() if value is not None}
    warnings, listed = [], []
    for key, value in unread.items():
        if key == "sharding_strategy" and not _agrees(top, fsdp, reshard):
            warnings.append(
                f"{place}: sharding_strategy: {value} is ignored, as Axolotl ignores it: what runs "
                f"is reshard_after_forward: {str(reshard).lower()}. In FSDP2: {reasons[key]}."
            )
        elif key in reasons:
            listed.append(f"{key} ({reasons[key]})")
    if listed:
        warnings.append(f"{place}: dropped, as FSDP2 has no such setting: {', '.join(listed)}.")
    unused = sorted(key for key in unread if key not in reasons)
    if fsdp.raw("cpu_offload_pin_memory") is False:
        unused.append("cpu_offload_pin_memory")
    if unused:
        warnings.append(f"{place}: kept, but not used here: {', '.join(unused)}.")
    return warnings


def strategy_name(value: object, fsdp: Section) -> str:
    """Return FSDP1's `sharding_strategy`, a name in either case or torch's number, in lower case.

    Raises:
        AutotuneError: it is none.
    """
    if isinstance(value, str) and value.isdecimal():  # accelerate takes it in quotes as well
        value = int(value)
    number = isinstance(value, int) and not isinstance(value, bool) and 0 < value <= len(_NUMBERED)
    name = _NUMBERED[value - 1] if number else value  # type: ignore[operator]
    name = name.lower() if isinstance(name, str) else name
    if name not in _NUMBERED:
        allowed = ", ".join(known.upper() for known in _NUMBERED)
        raise fsdp.error("sharding_strategy", f"Known: {allowed}.")
    return str(name)


def _agrees(top: Section, fsdp: Section, reshard: bool) -> bool:
    """Say whether FSDP1's `sharding_strategy`, which nobody reads, asks for what runs anyway."""
    name = strategy_name(fsdp.raw("sharding_strategy"), fsdp)
    if name == NO_SHARD:
        return False
    same, hybrid = STRATEGIES[name]
    return same is reshard and hybrid is top.has("dp_replicate_size")
