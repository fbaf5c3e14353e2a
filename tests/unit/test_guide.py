"""docs/guide.md: no row is empty, and the tests it names exist."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "guide.md").read_text()


def rows(text):
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("|") and cells[0] not in ("In the guide", "---"):
            yield cells


def faults(text):
    """Return what is wrong with each row."""
    found = []
    for cells in rows(text):
        if len(cells) != 3 or not all(cells):
            found.append(f"an empty cell: {cells}")
            continue
        tests = re.findall(r"`(tests/[^`]+)`", cells[2])
        if not tests and not (cells[2] == "none" and "not yet" in cells[1]):
            found.append(f"no test: {cells}")
        found += [f"no such test: {test}" for test in tests if not exists(test)]
    return found


def exists(test):
    path, _, name = test.partition("::")
    if not (ROOT / path).is_file():
        return False
    tree = ast.parse((ROOT / path).read_text())
    named = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    return not name or (name.startswith("test_") and name in named)


def test_every_row_is_filled_and_its_tests_exist():
    assert len(list(rows(GUIDE))) > 35
    assert faults(GUIDE) == []


def test_a_bad_row_is_found():
    assert faults("| a | | `tests/unit/test_guide.py` |")
    assert faults("| a | b | none |")
    assert faults("| a | b | `tests/unit/test_nothing.py` |")
    assert faults("| a | b | `tests/unit/test_guide.py::test_nothing` |")
    assert faults("| a | b | `tests/unit/test_guide.py::rows` |")
    named = "tests/unit/test_guide.py::test_a_bad_row_is_found"
    assert not faults(f"| a | not yet | none |\n| a | b | `{named}` |")
