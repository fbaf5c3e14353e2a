"""The tables of docs/memory.md, written between its markers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "memory.md"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in (header, *rows)]
    lines = [escaped[0], ["---"] * len(header), *escaped[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def with_block(text: str, name: str, block: str) -> str:
    """Return a page with the text between its markers of a name replaced.

    Raises:
        ValueError: the page has no such markers.
    """
    start, end = f"<!-- {name}: written by make bench-memory -->", f"<!-- end of {name} -->"
    before, found, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"no markers of {name}")
    return f"{before}{start}\n{block}\n{end}{after}"


def write(blocks: dict[str, str], page: Path = PAGE) -> None:
    """Replace the blocks of a page."""
    text = page.read_text(encoding="utf-8")
    for name, block in blocks.items():
        text = with_block(text, name, block)
    page.write_text(text, encoding="utf-8")
