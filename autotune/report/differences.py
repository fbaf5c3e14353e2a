"""What two studies did not have in common, and what that means for comparing them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from autotune.report import words
from autotune.report.study import Study

_IGNORED = ("schema_version", "name", "command", "created")


class Kind(StrEnum):
    """What a difference between two contracts means for the comparison."""

    WORK = "work"
    """What a step has to do: model, sequence, global batch, data. Ratios compare unlike things."""
    MACHINE = "machine"
    """Where it ran, and under which limit."""
    VERSIONS = "versions"
    SEARCH = "search"
    """Which configurations were looked at; a plan both looked at is not affected."""


_KINDS = {
    "hardware": Kind.MACHINE,
    "memory_limit_bytes": Kind.MACHINE,
    "versions": Kind.VERSIONS,
    "strategies": Kind.SEARCH,
    "micro_batches": Kind.SEARCH,
    "cp_degrees": Kind.SEARCH,
    "cp_backends": Kind.SEARCH,
    "tp_degrees": Kind.SEARCH,
    "recompute": Kind.SEARCH,
    "seed": Kind.SEARCH,
}
"""Of the contract's entries; every other one is the work."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One fact of the contract that the two studies do not share."""

    kind: Kind
    name: str
    first: str
    second: str


def find_differences(first: Study, second: Study) -> list[Difference]:
    """Return every fact of the two contracts that differs, the gravest kind first."""
    left = _facts(first.contract, second.contract)
    right = _facts(second.contract, first.contract)
    found = [
        Difference(
            kind=left.get(key, right.get(key, (Kind.WORK, "")))[0],
            name=key,
            first=left[key][1] if key in left else "not recorded",
            second=right[key][1] if key in right else "not recorded",
        )
        for key in dict.fromkeys([*left, *right])
        if left.get(key) != right.get(key)
    ]
    return sorted(found, key=lambda d: list(Kind).index(d.kind))


def _facts(contract: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Kind, str]]:
    """Return every fact of a contract by name, with what a difference in it would mean."""
    facts: dict[str, tuple[Kind, str]] = {}
    for key, value in contract.items():
        if key in _IGNORED:
            continue
        if key == "datasets":
            facts["data"] = (Kind.WORK, _datasets(value))
            continue
        kind = _KINDS.get(key, Kind.WORK)
        facts |= {name: (kind, text) for name, text in _flat(key, value, other.get(key, {}))}
    return facts


def _flat(name: str, value: Any, other: Any) -> Iterator[tuple[str, str]]:
    """Yield the facts inside a value, so that one changed number does not show a whole config.

    Where the other study has one word for all of it, such as none, it is one fact here, too.
    """
    if isinstance(value, Mapping) and isinstance(other, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}", inner, other.get(key, {}))
        return
    if name.endswith("_bytes") and isinstance(value, int | None):
        name, value = name.removesuffix("_bytes"), words.size(value) if value else None
    yield words.clean(name), words.clean(_text(value))


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, list):
        return ", ".join(_text(item) for item in value) or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(inner)}" for key, inner in value.items())
    return value if isinstance(value, str) else json.dumps(value)


def _datasets(sources: Any) -> str:
    """Name the data by its content where that was recorded: a moved file holds the same."""
    if not isinstance(sources, list) or not sources:
        return "synthetic documents"
    told = []
    for source in sources:
        facts = dict(source) if isinstance(source, Mapping) else {"path": source}
        if facts.get("content"):
            facts.pop("path", None)
        told.append(words.clean(json.dumps(facts, sort_keys=True)))
    return ", ".join(told)
