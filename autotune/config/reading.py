"""YAML and JSON files into plain mappings, with errors that name the place."""

from __future__ import annotations

import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from autotune.errors import AutotuneError


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys in silence; this loader refuses the second."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands here a second time", key_node.start_mark
                )
            if isinstance(key, Hashable):
                seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file whose top level maps text keys to values.

    Raises:
        AutotuneError: missing file, malformed YAML (line and column, counted from 1), no mapping.
    """
    return parse_yaml_mapping(read_text(path), path)


def parse_yaml_mapping(text: str, path: Path) -> dict[str, Any]:
    """Read YAML text whose top level maps text keys to values.

    Args:
        text: The text.
        path: What to call it in messages.

    Raises:
        AutotuneError: malformed YAML (line and column, counted from 1), no mapping.
    """
    try:
        values = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise AutotuneError(f"{path}{place}: not valid YAML: {error.problem or error}.") from None
    except yaml.YAMLError as error:
        raise AutotuneError(f"{path}: not valid YAML: {error}.") from None
    except RecursionError:
        raise AutotuneError(f"{path}: not valid YAML: nested too deeply.") from None
    except (ValueError, TypeError, AttributeError) as error:
        # PyYAML itself, on a date that does not exist or a tag whose value does not fit.
        raise AutotuneError(f"{path}: a value that YAML cannot read: {error}.") from None
    _check_finite(values, path)
    return _string_keyed(values, path)


def read_json_mapping(path: Path) -> dict[str, Any]:
    """Read a JSON file whose top level is an object.

    Raises:
        AutotuneError: missing file, malformed JSON (line and column), no object.
    """
    try:
        values = json.loads(read_text(path), object_pairs_hook=_unique_pairs)
    except json.JSONDecodeError as error:
        raise AutotuneError(
            f"{path}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}."
        ) from None
    except RecursionError:
        raise AutotuneError(f"{path}: not valid JSON: nested too deeply.") from None
    except ValueError as error:  # a repeated key, or more digits than Python reads
        raise AutotuneError(f"{path}: not valid JSON: {error}.") from None
    return _string_keyed(values, path)


def read_text(path: Path) -> str:
    """Return the text of a file, or say in one message why it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise AutotuneError(
            f"{path}: no such file. Give the path of a configuration file."
        ) from None
    except IsADirectoryError:
        raise AutotuneError(f"{path} is a folder. Give the path of a file in it.") from None
    except PermissionError:
        raise AutotuneError(f"{path}: no permission to read this file.") from None
    except UnicodeDecodeError as error:
        raise AutotuneError(f"{path}: not UTF-8 text (byte {error.start}).") from None
    except (OSError, ValueError) as error:  # a name too long for the system, or with a NUL
        raise AutotuneError(f"{path}: cannot be read: {error}.") from None


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Python keeps the last of two equal keys in silence; refuse the second."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands there a second time")
    return values


_MOST_VALUES = 100_000
"""Of a configuration with its aliases written out; a long one has some hundreds."""


def _check_finite(values: Any, path: Path) -> None:
    """Refuse anchors that contain themselves, or each other so often that no walk would end.

    Raises:
        AutotuneError: the file has one.
    """
    open_: set[int] = set()  # on the way from the top to here
    closed: dict[int, int] = {}  # seen whole, with how much it is when every alias is written out
    stack = [(values, False)]
    while stack:
        node, leaving = stack.pop()
        if not isinstance(node, dict | list):
            continue
        if leaving:
            open_.discard(id(node))
            closed[id(node)] = 1 + sum(closed.get(id(child), 1) for child in _children(node))
            if closed[id(node)] > _MOST_VALUES:
                raise AutotuneError(
                    f"{path}: its aliases (*) stand for more than {_MOST_VALUES:,} values. Write "
                    "what is meant without them."
                )
        elif id(node) in open_:
            raise AutotuneError(f"{path}: an anchor (&) contains itself. Remove its alias (*).")
        elif id(node) not in closed:
            open_.add(id(node))
            stack.append((node, True))
            stack += [(child, False) for child in _children(node)]


def _children(node: dict[Any, Any] | list[Any]) -> list[Any]:
    return list(node.values()) if isinstance(node, dict) else node


def _string_keyed(values: Any, path: Path) -> dict[str, Any]:
    if not isinstance(values, dict):
        found = "nothing" if values is None else type(values).__name__
        raise AutotuneError(f"{path}: expected `key: value` lines at the top level, found {found}.")
    for key in values:
        if not isinstance(key, str):
            raise AutotuneError(f"{path}: the key {key!r} is not text. Put it in quotes.")
    return values
