"""Single keys of a YAML text change, and no other character does."""

from pathlib import Path

import pytest
import yaml

from autotune.errors import AutotuneError
from autotune.migrate.document import Document

TEXT = """\
# first
a: 1   # of a
fsdp_config:   # of the section
  # above x
  x: 'one'  # of x
  y: [1, 2]   # of y

  # below y
z: |
  a # in a text
b: "c # no comment"   # of b
"""
PATH = Path("config.yml")


def change(text, *changes):
    document = Document(text, PATH)
    for name, *arguments in changes:
        getattr(document, name)(*arguments)
    return document.text()


def test_nothing_asked_nothing_changed():
    for text in (TEXT, TEXT.replace("\n", "\r\n"), TEXT.rstrip("\n"), f"\ufeff{TEXT}"):
        assert change(text) == text


@pytest.mark.parametrize(
    ("changes", "old", "new"),
    [
        ([("set_value", "", "a", 2)], "a: 1   # of a", "a: 2   # of a"),
        ([("rename", "fsdp_config", "x", "w")], "x: 'one'", "w: 'one'"),
        (
            [("rename", "fsdp_config", "x", "w"), ("set_value", "fsdp_config", "x", True)],
            "x: 'one'  # of x",
            "w: true  # of x",
        ),
        (
            [("remove", "fsdp_config", "y")],
            "  y: [1, 2]   # of y\n",
            "  # y (removed): of y\n",
        ),
        ([("remove", "", "z")], "z: |\n  a # in a text\n", ""),
        ([("remove", "", "b")], 'b: "c # no comment"   # of b\n', "# b (removed): of b\n"),
        (
            [("add", "fsdp_config", "n", "text: with colon")],
            "# of y\n",
            '# of y\n  n: "text: with colon"\n',
        ),
        (
            [("add_above", "a", {"v": 2, "m": {"k": False}})],
            "a: 1 ",
            "v: 2\nm:\n  k: false\na: 1 ",
        ),
        (
            [("remove", "fsdp_config", "y"), ("add", "fsdp_config", "n", 1)],
            "  y: [1, 2]   # of y\n",
            "  # y (removed): of y\n  n: 1\n",
        ),
    ],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_one_place_changes(changes, old, new, newline):
    given, wanted = TEXT.replace("\n", newline), TEXT.replace(old, new).replace("\n", newline)
    assert TEXT.count(old) == 1
    assert change(given, *changes) == wanted


def test_a_removed_section_leaves_its_comments():
    assert change(TEXT, ("remove", "", "fsdp_config")) == TEXT.replace(
        "fsdp_config:   # of the section\n  # above x\n  x: 'one'  # of x\n  y: [1, 2]   # of y\n",
        "# fsdp_config (removed): of the section\n# above x\n# fsdp_config (removed): of x\n"
        "# fsdp_config (removed): of y\n",
    )


@pytest.mark.parametrize(
    ("text", "changes", "wanted"),
    [
        ("s: {a: 1, b: 2}\n", [("remove", "s", "a")], "s: {b: 2}\n"),
        ("s: {a: 1, b: 2,}  # c\n", [("remove", "s", "b")], "s: {a: 1}  # c\n"),
        ("s: {a: 1}\n", [("remove", "s", "a"), ("add", "s", "b", True)], "s: {b: true}\n"),
        ("s: {a: 1,\n    b: {c: [1, 2]}}\n", [("rename", "s", "b", "d")],
         "s: {a: 1, d: {c: [1, 2]}}\n"),
        ("s: {a: 'x, y', b}\n", [("set_value", "s", "b", 3)], "s: {a: 'x, y', b: 3}\n"),
        ("a:\nb: 1", [("set_value", "", "a", 3)], "a: 3\nb: 1"),
        ("a:\n  b: 1", [("add", "a", "c", 2)], "a:\n  b: 1\n  c: 2"),
        ("a: 1\nb:\n- x\n- y\n# below\nc: 2\n", [("remove", "", "b")], "a: 1\n# below\nc: 2\n"),
        ('"a": 1\n', [("set_value", "", "a", "on")], '"a": "on"\n'),
        ("a:\n    b: 1\n", [("add", "a", "c", 2)], "a:\n    b: 1\n    c: 2\n"),
    ],
)  # fmt: skip
def test_other_spellings(text, changes, wanted):
    assert change(text, *changes) == wanted


@pytest.mark.parametrize(
    ("text", "changes", "words"),
    [
        ("{a: 1}\n", [], "in braces"),
        ("a: 1\na: 2\n", [], "second time"),
        ("a: [1\n", [], "not valid YAML"),
        ("s: &x {a: 1}\nt: *x\n", [("set_value", "s", "a", 2)], "cannot be changed safely"),
        ("x: &x {a: 1}\ns: *x\n", [("set_value", "s", "a", 2)], "alias"),
        ("x: &x {a: 1}\ns:\n  <<: *x\n  b: 2\n", [("remove", "s", "a")], "alias"),
        ("s: &x [1]\nt: *x\n", [("remove", "", "s")], "anchor"),
        ("s: {a: 1,  # why\n  b: 2}\n", [("remove", "s", "a")], "comment inside"),
    ],
)
def test_refused_without_a_change(text, changes, words):
    with pytest.raises(AutotuneError, match=words):
        change(text, *changes)


@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_the_last_line_gives_way_without_a_gap(end):
    newline = end or "\n"
    text = newline.join(["s:", "  a: 1", "  b: 2"]) + end
    changed = change(text, ("remove", "s", "b"), ("add", "s", "c", True))
    assert changed == newline.join(["s:", "  a: 1", "  c: true"]) + end


def test_a_wrong_edit_is_noticed(monkeypatch):
    """The result is read and compared: a slip of a position must not reach the file."""
    end = Document._end
    monkeypatch.setattr(Document, "_end", lambda self, *nodes: end(self, *nodes) + 20)
    with pytest.raises(AutotuneError, match="cannot be changed safely"):
        change(TEXT, ("remove", "fsdp_config", "x"))


def test_every_value_survives():
    text = TEXT + "n: 2e-5\no: 0o17\np: yes\nd: 2026-11-24\nt: !!str 5\nq: ~\n"
    changed = yaml.safe_load(change(text, ("remove", "", "a")))
    assert changed == {key: v for key, v in yaml.safe_load(text).items() if key != "a"}
