"""What every configuration of a study had to do alike, for the page."""

from __future__ import annotations

import json
from typing import Any

from autotune.report import words
from autotune.report.study import Study
from autotune.spec.workload import Precision
from autotune.units import format_bytes

Facts = list[tuple[str, str]]

_NUMERICS = {
    Precision.BF16: "fp32 master weights, bf16 compute, fp32 gradient reduction and accumulation, "
    "fp32 loss, on every engine",
    Precision.FP32: "everything in fp32",
}


def contract(study: Study) -> list[tuple[str, Facts]]:
    """Return titled groups of facts; a group an older version did not record is left out."""
    search: Facts = [
        (key, _value(value))
        for key, value in (
            ("stopped because", study.summary.get("stopped_because")),
            ("launches", study.summary.get("launches")),
            ("started", study.contract.get("created")),
            ("strategies", study.contract.get("strategies")),
            ("memory limit a rank", _bytes(study.contract.get("memory_limit_bytes"))),
        )
        if value not in (None, "", [])
    ]
    groups = [
        ("Model", _facts(study.section("model"))),
        ("Workload", _facts(study.section("workload"))),
        ("Numerics", _numerics(study)),
        ("Hardware", _facts(study.section("hardware"))),
        ("Search", search),
        ("Versions", _facts(study.section("versions"))),
    ]
    return [(title, facts) for title, facts in groups if facts]


def _numerics(study: Study) -> Facts:
    precision = study.section("workload").get("precision")
    try:
        return [(str(precision), _NUMERICS[Precision(str(precision))])]
    except ValueError:
        return []


def _facts(section: dict[str, Any]) -> Facts:
    facts: Facts = []
    for key, value in section.items():
        if key.endswith("_bytes"):
            facts.append((key.removesuffix("_bytes").replace("_", " "), _bytes(value) or "none"))
        else:
            facts.append((words.clean(key.replace("_", " ")), _value(value)))
    return facts


def _bytes(value: Any) -> str | None:
    return format_bytes(value) if isinstance(value, int | float) else None


def _value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return ", ".join(_value(item) for item in value) or "none"
    if isinstance(value, dict):
        return words.clean(json.dumps(value, sort_keys=True))
    return words.clean(value)
