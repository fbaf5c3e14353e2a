"""Which keys a configuration may carry, and what to say about those that are not used."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from autotune.errors import AutotuneError, nearest

_MOST_NAMED = 20
_ON_BY_DEFAULT = frozenset({"pretraining_sample_concatenation", "shuffle_merged_datasets"})
"""Keys whose false asks for something."""
USE_LIGER = "use_liger_kernel"
"""`TrainingArguments`' own switch, which Axolotl passes over: Liger's kernels, all of them."""
AUTOTUNE_KEY = "autotune"
"""The one top-level key of ours; Axolotl ignores keys it does not know."""


class KeyCatalogue(BaseModel):
    """``spec/catalogue/axolotl_keys.yaml``: the key names of Axolotl and of DeepSpeed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    axolotl_version: str
    keys: frozenset[str]
    plugin_keys: frozenset[str]
    dataset_keys: frozenset[str]
    fsdp_keys: frozenset[str]
    fsdp1_keys: dict[str, str]
    renamed: dict[str, str]
    attention_switches: dict[str, str]
    removed: dict[str, str]
    nested_keys: dict[str, frozenset[str]]
    harmless: frozenset[str]
    deepspeed_version: str
    deepspeed_keys: frozenset[str]
    deepspeed_sections: dict[str, frozenset[str]]
    compile_keys: frozenset[str]
    zero_keys: frozenset[str]
    offload_keys: frozenset[str]

    @property
    def top_level(self) -> frozenset[str]:
        """Every key a file may carry at its top level."""
        return self.keys | self.plugin_keys | {AUTOTUNE_KEY, USE_LIGER}


@cache
def key_catalogue() -> KeyCatalogue:
    """Return the shipped key names."""
    text = (files("autotune") / "spec" / "catalogue" / "axolotl_keys.yaml").read_text("utf-8")
    return KeyCatalogue.model_validate(yaml.safe_load(text))


def check_known(values: Iterable[str], known: Collection[str], where: str) -> None:
    """Refuse keys that are not known, each with the nearest that is.

    Raises:
        AutotuneError: names the unknown keys, the first twenty of them.
    """
    unknown = [key for key in values if key not in known]
    if unknown:
        named = [f"`{str(key)[:200]}`{nearest(str(key)[:200], known, count=1).rstrip('.')}"
                 for key in unknown[:_MOST_NAMED]]  # fmt: skip
        more = len(unknown) - len(named)
        plural = "keys" if len(unknown) > 1 else "key"
        raise AutotuneError(
            f"{where}: unknown {plural} {', '.join(named)}{f' and {more} more' if more else ''}. "
            "Correct or remove it."
        )


def check_nested(
    values: Mapping[str, Any], known: Mapping[str, Collection[str]], where: str
) -> None:
    """Refuse unknown keys in the mappings below `values`, or in the entries of lists below it.

    Args:
        values: The mapping around them.
        known: By name of the nested mapping, its keys. Another mapping may hold anything.
        where: What to call `values` in messages.

    Raises:
        AutotuneError: names the unknown keys of one mapping.
    """
    for name, keys in known.items():
        found = values.get(name)
        entries = found if isinstance(found, list) else [found]
        for entry in entries:
            if isinstance(entry, Mapping):
                check_known(entry, keys, f"{where}: {name}")


def unused_warning(
    passthrough: Mapping[str, Any], where: str, idle: Collection[str] = ()
) -> str | None:
    """Say which keys are kept but not used although they would change the training.

    Keys set to false, null or an empty value ask for nothing and are not named, but for the few
    that are on by default.

    Args:
        passthrough: The keys that are kept.
        where: What to call the file.
        idle: Keys that do nothing in this file.
    """
    harmless = key_catalogue().harmless
    changing = [key for key, value in passthrough.items()
                if (value or (value is False and key in _ON_BY_DEFAULT))
                and key not in harmless and key not in idle]  # fmt: skip
    if not changing:
        return None
    return (
        f"{where}: these Axolotl keys are kept but not used here, although they would change the "
        f"training, its speed or its memory: {', '.join(sorted(changing))}."
    )
