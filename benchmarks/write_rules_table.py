"""Write the table of rules in docs/rules.md again from autotune/explanations.py.

python benchmarks/write_rules_table.py
"""

from __future__ import annotations

import re
from pathlib import Path

from autotune.explanations import retired_lines, rules_table

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "rules.md"
GENERATED = re.compile(r"^\| Code \|.*\n(?:\|.*\n)+\n(?:AT\d+ is unused: .*\n)*", re.MULTILINE)


def main() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(with_table(text), encoding="utf-8")


def with_table(text: str) -> str:
    """Return the document with the table of today in the place of the one it has."""
    new, times = GENERATED.subn(lambda _: f"{rules_table()}\n{retired_lines()}", text)
    assert times == 1, "docs/rules.md has no table, or two"
    return new


if __name__ == "__main__":
    main()
