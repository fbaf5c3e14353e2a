"""`Document`: YAML text in which single keys change and every other character stays.

A library that reads YAML and writes it again (ruamel.yaml) keeps comments by hanging each on the
value before it: a removed key takes along the comment above the next one. It also sets indents and
line ends its own way. Here PyYAML says where each key and value stands, and only those places
change.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from autotune.config.reading import parse_yaml_mapping
from autotune.errors import AutotuneError

_Value = TypeVar("_Value")
_TOP = ""
"""The section that is the document itself."""


@dataclass(frozen=True, slots=True)
class _Edit:
    start: int
    end: int
    text: str


class Document:
    """A YAML mapping and the changes to it; `text` is the result.

    A section is the name of a top-level key whose value is a mapping, or "" for the top level. Keys
    are named as the file has them, also after they were renamed.
    Places that an alias or a merge key fills cannot be changed: they stand elsewhere, too.

    Args:
        text: The file's text, line ends as they are.
        path: What to call it in messages.

    Raises:
        AutotuneError: no YAML, no mapping, or one in braces at the top level.
    """

    def __init__(self, text: str, path: Path) -> None:
        self.path = path
        """What it is called in messages."""
        self.values = parse_yaml_mapping(text, path)
        """What the file says, aliases written out."""
        self._newline = "\r\n" if "\r\n" in text else "\n"
        self._lacks_end = not text.endswith("\n")
        self._text = text = text + self._newline if self._lacks_end else text
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        assert isinstance(root, yaml.MappingNode)  # parse_yaml_mapping has seen it
        if root.flow_style:
            raise AutotuneError(
                f"{path}: the file is one mapping in braces. Write it as lines of `key: value`."
            )
        self._root = root
        self._comments = _comments(text)
        self._aliased = _alias_places(text)
        self._edits: list[_Edit] = []
        self._names: dict[tuple[str, str], str] = {}
        """Of renamed keys: by section and name in the file, the name now."""
        self._braces: dict[str, dict[str, str]] = {}
        """Of sections in braces that change: the text of each value, by the key's name."""
        self._expected: dict[str, Any] = {
            key: dict(value) if isinstance(value, dict) else value
            for key, value in self.values.items()
        }

    def rename(self, section: str, key: str, name: str) -> None:
        """Give a key another name; its value and its comment stay."""
        key_node, _ = self._entry(section, key)
        braces = self._in_braces(section)
        if braces is None:
            self._replace(key_node, name)
        else:
            self._braces[section] = _renamed(braces, key, name)
        self._names[section, key] = name
        held = _renamed(self._held(section), key, name)
        if section == _TOP:
            self._expected = held
        else:
            self._expected[section] = held

    def set_value(self, section: str, key: str, value: bool | int | str) -> None:
        """Give a key another value; its comment stays."""
        _, value_node = self._entry(section, key)
        name = self._names.get((section, key), key)
        braces = self._in_braces(section)
        if braces is None:
            at = value_node.start_mark.index
            filler = " " if at == value_node.end_mark.index and self._text[at - 1] == ":" else ""
            self._replace(value_node, filler + _scalar(value))
        else:
            braces[name] = _scalar(value)
        self._held(section)[name] = value

    def remove(self, section: str, key: str) -> None:
        """Take a key out; comments on its lines stay as lines of their own."""
        key_node, value_node = self._entry(section, key)
        start, end = key_node.start_mark.index, self._end(value_node, key_node)
        if any(start <= at < end for at in self._aliased):
            raise AutotuneError(
                f"{self.path}: {key} holds an anchor (&) that another key uses. Write the value "
                "out where it is used, then run this again."
            )
        braces = self._in_braces(section)
        if braces is not None:
            del braces[key]
        else:
            start, end = self._line_start(start), self._line_end(end)
            indent = " " * key_node.start_mark.column
            kept = [f"{indent}{self._owned(at, key)}{self._newline}"
                    for at in self._comments if start <= at < end]  # fmt: skip
            self._edits.append(_Edit(start, end, "".join(kept)))
        del self._held(section)[key]

    def add(self, section: str, key: str, value: bool | int | str) -> None:
        """Add a key at the end of a section that holds at least one."""
        braces = self._in_braces(section)
        if braces is not None:
            braces[key] = _scalar(value)
        else:
            mapping = self._mapping(section)
            key_node, value_node = mapping.value[-1]
            column = mapping.value[0][0].start_mark.column
            at = self._line_end(self._end(value_node, key_node))
            self._insert_lines(at, [f"{' ' * column}{key}: {_scalar(value)}"])
        self._held(section)[key] = value

    def add_above(self, anchor: str, values: dict[str, Any]) -> None:
        """Add top-level keys on the lines above another; a value may be a mapping of scalars."""
        key_node, _ = self._entry(_TOP, anchor)
        lines: list[str] = []
        for key, value in values.items():
            if isinstance(value, dict):
                lines.append(f"{key}:")
                lines += [f"  {inner}: {_scalar(each)}" for inner, each in value.items()]
            else:
                lines.append(f"{key}: {_scalar(value)}")
            self._expected[key] = value
        self._insert_lines(self._line_start(key_node.start_mark.index), lines)

    def text(self) -> str:
        """Return the text with every change made.

        Raises:
            AutotuneError: the file is written in a way in which the changes cannot be made; what
                the text would say was compared with what it should.
        """
        text = self._text
        edits = [*self._edits, *(self._rewritten(*each) for each in self._braces.items())]
        # Later places first; of two at the same place the one asked for later goes below.
        order = sorted(enumerate(edits), key=lambda e: (e[1].start, e[1].end, e[0]))
        for _, edit in reversed(order):
            text = text[: edit.start] + edit.text + text[edit.end :]
        # Without the line end that the file lacked, unless a block of text, now last, needs it.
        for each in [text.removesuffix(self._newline), text] if self._lacks_end else [text]:
            if self._says_what_it_should(each):
                return each
        raise AutotuneError(
            f"{self.path}: its FSDP keys are written in a way that cannot be changed safely "
            "(tags, anchors or braces over several lines). Write them as plain "
            "lines of `key: value`, then run this again. Nothing was changed."
        )

    def _says_what_it_should(self, text: str) -> bool:
        try:
            return parse_yaml_mapping(text, self.path) == self._expected
        except AutotuneError:
            return False

    def _mapping(self, section: str) -> yaml.MappingNode:
        if section == _TOP:
            return self._root
        _, node = self._entry(_TOP, section)
        assert isinstance(node, yaml.MappingNode)
        return node

    def _held(self, section: str) -> dict[str, Any]:
        held: dict[str, Any] = self._expected if section == _TOP else self._expected[section]
        return held

    def _in_braces(self, section: str) -> dict[str, str] | None:
        """Return the text of each value of a section written in braces; None of one in lines."""
        mapping = self._mapping(section)
        if not mapping.flow_style:
            return None
        if section not in self._braces:
            start, end = mapping.start_mark.index, mapping.end_mark.index
            if any(start <= at < end for at in self._comments):
                raise AutotuneError(
                    f"{self.path}: {section} is written in braces with a comment inside, which "
                    "would be lost. Write it as lines of `key: value`, then run this again."
                )
            self._braces[section] = {
                key.value: self._text[key.end_mark.index : value.end_mark.index]
                .lstrip().removeprefix(":").lstrip()
                if value.start_mark.index >= key.end_mark.index else ""
                for key, value in mapping.value
            }  # fmt: skip
        return self._braces[section]

    def _rewritten(self, section: str, values: dict[str, str]) -> _Edit:
        mapping = self._mapping(section)
        inner = ", ".join(f"{key}: {value}" for key, value in values.items())
        return _Edit(mapping.start_mark.index, mapping.end_mark.index, f"{{{inner}}}")

    def _entry(self, section: str, key: str) -> tuple[yaml.Node, yaml.Node]:
        """Return the nodes of a key and its value.

        Raises:
            AutotuneError: the value, or the whole section, is written elsewhere in the file.
        """
        mapping = self._root if section == _TOP else self._mapping(section)
        for key_node, value_node in mapping.value:
            if key_node.value == key:
                if value_node.start_mark.index < key_node.end_mark.index:
                    raise self._written_elsewhere(key)
                return key_node, value_node
        raise self._written_elsewhere(key)

    def _written_elsewhere(self, key: str) -> AutotuneError:
        return AutotuneError(
            f"{self.path}: {key} comes from an alias (*) or a merge (<<), so that a change would "
            "reach other keys, too. Write it out where it is used, then run this again."
        )

    def _replace(self, node: yaml.Node, text: str) -> None:
        self._edits.append(_Edit(node.start_mark.index, node.end_mark.index, text))

    def _owned(self, at: int, key: str) -> str:
        """Return a comment of a removed key, with the key where it stood beside its value."""
        comment = self._text[at : self._line_end(at)].rstrip()
        if not self._text[self._line_start(at) : at].strip():
            return comment
        return f"# {key} (removed):{comment[1:]}"

    def _insert_lines(self, at: int, lines: list[str]) -> None:
        self._edits.append(_Edit(at, at, "".join(line + self._newline for line in lines)))

    def _line_start(self, at: int) -> int:
        return self._text.rfind("\n", 0, at) + 1

    def _line_end(self, at: int) -> int:
        end = self._text.find("\n", at)
        return len(self._text) if end < 0 else end + 1

    def _end(self, node: yaml.Node, key: yaml.Node) -> int:
        """Return where a value ends, without the comments below it that its own mark includes."""
        if node.start_mark.index < key.end_mark.index:  # an alias: its mark is the anchor's
            return self._line_end(key.end_mark.index) - 1
        if isinstance(node, yaml.MappingNode) and not node.flow_style and node.value:
            return max(self._end(value, inner) for inner, value in node.value)
        if isinstance(node, yaml.SequenceNode) and not node.flow_style and node.value:
            ends = (self._end(value, key) for value in node.value)
            return max(end for end in ends)
        end = max(node.end_mark.index, key.end_mark.index)
        # A block of text ends at the start of the line below it.
        return end - 1 if self._text[end - 1 : end] == "\n" else end


def _renamed(values: dict[str, _Value], key: str, name: str) -> dict[str, _Value]:
    return {name if each == key else each: value for each, value in values.items()}


def _scalar(value: bool | int | str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    text = str(value)
    plain = yaml.safe_load(text) == value if text else False
    return text if plain else json.dumps(text, ensure_ascii=False)


def _comments(text: str) -> list[int]:
    """Return where each comment begins."""
    inside: list[tuple[int, int]] = [
        (token.start_mark.index, token.end_mark.index)
        for token in yaml.scan(text, Loader=yaml.SafeLoader)
        if isinstance(token, yaml.ScalarToken)
    ]
    found, at = [], 0
    spans = iter(inside)
    span = next(spans, None)
    while (at := text.find("#", at)) >= 0:
        while span is not None and span[1] <= at:
            span = next(spans, None)
        if span is not None and span[0] <= at:
            at = span[1]
        elif at == 0 or text[at - 1] in " \t\r\n\ufeff":
            found.append(at)
            at = len(text) if (end := text.find("\n", at)) < 0 else end
        else:
            at += 1
    return found


def _alias_places(text: str) -> list[int]:
    """Return where each anchor stands that an alias uses."""
    tokens = list(yaml.scan(text, Loader=yaml.SafeLoader))
    used = {token.value for token in tokens if isinstance(token, yaml.AliasToken)}
    return [
        token.start_mark.index
        for token in tokens
        if isinstance(token, yaml.AnchorToken) and token.value in used
    ]
