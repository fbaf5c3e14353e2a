"""Old names of Axolotl's keys into those of today."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autotune.config.keys import key_catalogue
from autotune.errors import AutotuneError

ATTENTION = "attn_implementation"
_FSDP_STATE_DICT = "fsdp_final_state_dict_type"


def canonical_keys(values: Mapping[str, Any], where: str) -> tuple[dict[str, Any], str | None]:
    """Return the file's keys under their names of today, and a warning that names the old ones.

    Raises:
        AutotuneError: an old and a new name that contradict each other, or a key that Axolotl
            refuses by now.
    """
    catalogue = key_catalogue()
    for key, advice in catalogue.removed.items():
        if values.get(key):
            raise AutotuneError(
                f"{where}: {key} no longer exists in Axolotl {catalogue.axolotl_version}. {advice}"
            )
    kept = {key: value for key, value in values.items() if key not in catalogue.removed}
    old: list[str] = []
    for key, new in catalogue.renamed.items():
        if key in kept:
            _move(kept, key, new, kept.pop(key), where, old)
    for key, attention in catalogue.attention_switches.items():
        if key in kept:
            switch = kept.pop(key)
            _move(kept, key, ATTENTION, attention if switch else None, where, old)
    fsdp = kept.get("fsdp_config") or ({} if kept.get("fsdp") else None)
    if isinstance(fsdp, Mapping) and _FSDP_STATE_DICT in kept:
        inner = dict(fsdp)
        state = kept.pop(_FSDP_STATE_DICT)
        _move(inner, _FSDP_STATE_DICT, "final_state_dict_type", state, where, old)
        kept["fsdp_config"] = inner
    if not old:
        return kept, None
    version = catalogue.axolotl_version
    return kept, f"{where}: deprecated in Axolotl {version}: {', '.join(old)}."


def _move(
    kept: dict[str, Any], old: str, new: str, value: Any, where: str, moved: list[str]
) -> None:
    if value is None:
        return
    present = kept.get(new)
    if present is not None and present != value:
        raise AutotuneError(
            f"{where}: {new}: {present} and its old name {old} (here {new}: {value}) contradict "
            f"each other. Keep {new}."
        )
    kept[new] = value
    moved.append(f"{old} (now {new}{f': {value}' if new == ATTENTION else ''})")
