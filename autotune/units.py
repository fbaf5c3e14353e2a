"""Bytes, seconds and their text forms. GiB means 2**30 bytes everywhere in this project."""

from __future__ import annotations

import math
import re

from autotune.errors import AutotuneError

KIB, MIB, GIB = 2**10, 2**20, 2**30
_BYTE_UNITS = {
    "": 1, "b": 1,
    "k": KIB, "kib": KIB, "kb": 10**3,
    "m": MIB, "mib": MIB, "mb": 10**6,
    "g": GIB, "gib": GIB, "gb": 10**9,
    "t": 2**40, "tib": 2**40, "tb": 10**12,
}  # fmt: skip
_SECOND_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_COUNT_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def parse_count(text: str) -> int:
    """Read ``"10B"``, ``"500M"``, ``"1T"`` or a plain number; the units are decimal."""
    return math.ceil(_parse(text, _COUNT_UNITS, "a count", "500M, 10B or 1T"))


def parse_bytes(text: str) -> int:
    """Read ``"600MiB"``, ``"80GB"`` or a plain number of bytes; ``M`` and ``G`` are binary."""
    return int(_parse(text, _BYTE_UNITS, "a size", "600MiB, 80GB or 1.5G"))


def parse_duration_s(text: str) -> float:
    """Read ``"20m"``, ``"1.5h"``, ``"90s"`` or a plain number of seconds."""
    return _parse(text, _SECOND_UNITS, "a duration", "90s, 20m or 1.5h")


def short_count(count: float) -> str:
    """Write a count with three significant figures, as ``parse_count`` reads it: ``8.19B``."""
    rounded = float(f"{count:.3g}")  # first, so that 999.7B is 1T
    for factor, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if rounded >= factor:
            return f"{rounded / factor:g}{letter}"
    return f"{rounded:.0f}"


def _parse(text: str, units: dict[str, float] | dict[str, int], what: str, examples: str) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match and match[2].lower() in units:
        value = float(match[1]) * units[match[2].lower()]
        if 0 < value < math.inf:
            return value
    raise AutotuneError(f"{text!r} is not {what}. Write it as {examples}.")


def format_bytes(num_bytes: float) -> str:
    """Write bytes in MiB with one decimal or GiB with two; so few that no MiB shows, as a count."""
    if 0 < abs(num_bytes) < MIB / 20:
        return f"{num_bytes:,.0f} bytes"
    if abs(num_bytes) < GIB:
        return f"{num_bytes / MIB:.1f} MiB"
    return f"{num_bytes / GIB:.2f} GiB"


def format_duration(seconds: float) -> str:
    """Write seconds as a person would say them: ``850 ms``, ``12.3 s``, ``4 min 05 s``."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
