"""`fsdp_config` of an accelerate file as Axolotl's.

The two spell the same settings alike, but for one: accelerate obeys FSDP1's sharding strategy,
which Axolotl's `fsdp_config` ignores.
"""

from __future__ import annotations

from typing import Any

from autotune.config.foreign.translated import Translated
from autotune.config.keys import key_catalogue
from autotune.config.values import Section

_STRATEGIES = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2")
"""torch's `ShardingStrategy` by number, from 1: accelerate takes either."""
_KEPT_GATHERED = ("SHARD_GRAD_OP", "HYBRID_SHARD_ZERO2")
_VERSION = "fsdp_version"


def translate_fsdp(section: Section, num_machines: int) -> Translated:
    """Translate `fsdp_config`; FSDP1 is read as FSDP2 with the same sharding.

    Raises:
        AutotuneError: a strategy or version that is not known.
    """
    given = section.unread()
    version = section.integer(_VERSION, 1)
    if version not in (1, 2):
        raise section.error(_VERSION, "Allowed: 1, 2.")
    values = {
        key.removeprefix("fsdp_"): _plain(value)
        for key, value in given.items()
        if key != _VERSION and value is not None
    }
    found = Translated()
    if version == 1:
        strategy = _strategy(section, values)
        if strategy == "NO_SHARD":
            found.warnings.append(f"{section.where}: NO_SHARD is DDP: read so.")
            return found
        values["reshard_after_forward"] = strategy not in _KEPT_GATHERED
        if strategy.startswith("HYBRID") and num_machines > 1:
            found.keys["dp_replicate_size"] = num_machines
        reshard = str(values["reshard_after_forward"]).lower()
        found.warnings.append(
            f"{section.where}: FSDP1 with {strategy} is read as FSDP2 with reshard_after_forward: "
            f"{reshard}" + (f" and dp_replicate_size: {num_machines}." if found.keys else ".")
        )
    known = key_catalogue().fsdp_keys | set(key_catalogue().fsdp1_keys)
    values.pop("sharding_strategy", None)
    unknown = [key for key in values if key not in known]
    for key in unknown:
        del values[key]
    found.warn_unused(section.where, [f"fsdp_{key}" for key in unknown], "FSDP2 here has no such "
                      "setting")  # fmt: skip
    if values.get("transformer_layer_cls_to_wrap") == "":
        del values["transformer_layer_cls_to_wrap"]
    if values.get("auto_wrap_policy") == "NO_WRAP":
        found.warnings.append(
            f"{section.where}: fsdp_auto_wrap_policy: NO_WRAP gathers the whole model at once; it "
            "is read as TRANSFORMER_BASED_WRAP, which is what runs here."
        )
        values["auto_wrap_policy"] = "TRANSFORMER_BASED_WRAP"
    found.keys |= {"fsdp_version": 2, "fsdp_config": {"reshard_after_forward": True} | values}
    return found


def _plain(value: Any) -> Any:
    """Return a value as YAML would have it: old files write "true" in quotes."""
    return (
        {"true": True, "false": False}.get(value.lower(), value)
        if isinstance(value, str)
        else (value)
    )


def _strategy(section: Section, values: dict[str, Any]) -> str:
    """Return FSDP1's strategy by name; both keys that accelerate takes it from."""
    given = values.get("sharding_strategy")
    key = "fsdp_sharding_strategy"
    if given is None and not isinstance(values.get("reshard_after_forward"), bool):
        given, key = values.get("reshard_after_forward"), "fsdp_reshard_after_forward"
    if given is None:
        return _STRATEGIES[0]
    name = str(given).upper()
    if name.isdigit() and 0 < int(name) <= len(_STRATEGIES):
        name = _STRATEGIES[int(name) - 1]
    if name not in _STRATEGIES:
        raise section.error(key, f"Allowed: {', '.join(_STRATEGIES)}.")
    return name
