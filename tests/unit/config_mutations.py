"""Seeded damage to configuration files: of their structure, and of their text."""

from __future__ import annotations

import copy
import datetime
import random
from collections.abc import Callable
from typing import Any

import yaml

JUNK: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 3, 1.5, -0.0, 10**18, 10**30, 10**400, 1e308, float("inf"),
    float("nan"), "", " ", "x", "\0", "a" * 5000, "~nobody/model", "größe 日本 \U0001f600", "2e-5",
    "0x10", "1_000", "1:30", "auto", "null", "../..", "/", "on", "[", "{a: b", "%d %s {}", [], {},
    [[]], {"a": 1}, {1: 2}, {None: None}, ["x"], [1, "a", None], [{}], {"path": 3}, b"\xff\x00",
    datetime.date(2026, 2, 3), {"enabled": True}, {"device": "nvme"}, {"stage": "three"},
)  # fmt: skip

Path = tuple[Any, ...]


def places(node: Any, path: Path = ()) -> list[Path]:
    """Return the path of every value below the top."""
    children = node.items() if isinstance(node, dict) else enumerate(node)
    found = []
    for key, child in children:
        found.append((*path, key))
        if isinstance(child, dict | list):
            found += places(child, (*path, key))
    return found


def damage_structure(values: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """Return a copy with one to three values dropped, renamed, replaced, nested or swapped."""
    values = copy.deepcopy(values)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        known = places(values)
        if known:
            draw.choice(_STRUCTURAL)(values, draw.choice(known), draw)
    return values


def damage_text(text: str, draw: random.Random) -> str:
    """Return the text cut off, or with lines or characters lost, doubled, moved or foreign."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        text = draw.choice(_TEXTUAL)(text, draw)
    return text


def dump(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _parent(values: Any, path: Path) -> Any:
    for key in path[:-1]:
        values = values[key]
    return values


def _drop(values: Any, path: Path, draw: random.Random) -> None:
    del _parent(values, path)[path[-1]]


def _retype(values: Any, path: Path, draw: random.Random) -> None:
    _parent(values, path)[path[-1]] = copy.deepcopy(draw.choice(JUNK))


def _misspell(values: Any, path: Path, draw: random.Random) -> None:
    parent, key = _parent(values, path), path[-1]
    if isinstance(parent, dict) and isinstance(key, str) and key:
        at = draw.randrange(len(key))
        wrong = draw.choice(
            [key[:at] + key[at + 1 :], key[:at] + "x" + key[at:], key.upper(), key + "ß", at]
        )
        parent[wrong] = parent.pop(key)


def _nest(values: Any, path: Path, draw: random.Random) -> None:
    parent, key = _parent(values, path), path[-1]
    parent[key] = draw.choice([{key: parent[key]}, [parent[key]], [[[parent[key]]]]])


def _swap(values: Any, path: Path, draw: random.Random) -> None:
    other = draw.choice(places(values))
    if other[: len(path)] == path or path[: len(other)] == other:
        return
    mine, its = _parent(values, path), _parent(values, other)
    mine[path[-1]], its[other[-1]] = its[other[-1]], mine[path[-1]]


def _copy_elsewhere(values: Any, path: Path, draw: random.Random) -> None:
    parent = _parent(values, draw.choice(places(values)))
    if isinstance(parent, dict):
        parent[path[-1]] = copy.deepcopy(_parent(values, path)[path[-1]])


_STRUCTURAL: list[Callable[[Any, Path, random.Random], None]] = [
    _drop, _retype, _retype, _retype, _misspell, _nest, _swap, _copy_elsewhere,
]  # fmt: skip


def _truncate(text: str, draw: random.Random) -> str:
    return text[: draw.randrange(len(text) + 1)]


def _line(change: Callable[[list[str], int], None]) -> Callable[[str, random.Random], str]:
    def changed(text: str, draw: random.Random) -> str:
        lines = text.splitlines(True)
        if lines:
            change(lines, draw.randrange(len(lines)))
        return "".join(lines)

    return changed


def _tab(lines: list[str], at: int) -> None:
    lines[at] = "\t" + lines[at]


def _indent(lines: list[str], at: int) -> None:
    lines[at] = "   " + lines[at]


def _double(lines: list[str], at: int) -> None:
    lines.insert(at, lines[at])


def _lose(lines: list[str], at: int) -> None:
    del lines[at]


def _insert(text: str, draw: random.Random) -> str:
    at = draw.randrange(len(text) + 1)
    piece = draw.choice(
        ["\0", "\x07", "\ufeff", "\u2028", "é", ":", "- ", "#", "'", '"', "{", "]", "&a ", "*a",
         "!!int ", "!!python/object:os.system ", "<<: ", "? ", "|\n", "---\n", "\r", "9" * 5000,
         "[" * 600, "2026-13-45"]
    )  # fmt: skip
    return text[:at] + piece + text[at:]


def _swap_character(text: str, draw: random.Random) -> str:
    if not text:
        return text
    at = draw.randrange(len(text))
    return text[:at] + draw.choice(":-[]{}&*#?|>%@`,\t \n0a") + text[at + 1 :]


_TEXTUAL: list[Callable[[str, random.Random], str]] = [
    _truncate, _line(_tab), _line(_indent), _line(_double), _line(_lose), _insert, _insert,
    _swap_character, _swap_character,
]  # fmt: skip
