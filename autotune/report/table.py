"""A table a reader can sort, filter and page through: its rows as the page's script wants them.

The page carries the rows twice: the first ones as HTML, for readers without JavaScript, and all of
them as data, from which the script makes the rows that are looked at. So thousands of rows cost a
page no more than a hundred do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PAGE_ROWS = 100
"""Rows shown at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """One column."""

    title: str
    kind: str = "text"
    """``text``, ``num`` (right-aligned, largest first when sorted) or ``long`` (wraps)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One cell: its text, and what it is sorted by; None is not measured and stays last."""

    text: str
    sort: float | str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row."""

    cells: tuple[Cell, ...]
    """The first one is the row's header."""
    facets: tuple[str, ...]
    """Its value of each of the table's filters."""
    mark: str = ""
    """A CSS class: ``winner`` or ``failed``."""
    tag: str = ""
    """A word beside the row's name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A table with its filters."""

    key: str
    """The table's id in the page."""
    title: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    facets: Sequence[str]
    """Names of the filters that choose one value."""
    example: str
    """What a reader might type into the text filter."""
    sorted_by: int | None = None
    """The column the rows come sorted by, largest first."""

    @property
    def first_rows(self) -> Sequence[Row]:
        """Those that are in the page as HTML."""
        return self.rows[:PAGE_ROWS]

    def facet_values(self, index: int) -> list[str]:
        """Return the values of one filter."""
        return sorted({row.facets[index] for row in self.rows})

    def data(self) -> dict[str, Any]:
        """Return the rows for the page's script: columns of texts and of places in the order."""
        values = [self.facet_values(index) for index in range(len(self.facets))]
        places = [{value: place for place, value in enumerate(known)} for known in values]
        return {
            "pageRows": PAGE_ROWS,
            "texts": [
                [row.cells[index].text for row in self.rows] for index in range(len(self.columns))
            ],
            "ranks": [
                _ranks([row.cells[index].sort for row in self.rows])
                for index in range(len(self.columns))
            ],
            "facetValues": values,
            "facets": [
                [places[index][row.facets[index]] for row in self.rows]
                for index in range(len(self.facets))
            ],
            "marks": [row.mark for row in self.rows],
            "tags": [row.tag for row in self.rows],
        }


def _ranks(keys: Sequence[float | str | None]) -> list[int | None]:
    """Return each key's place in the order: shorter than a float, and sorts text and figures."""
    known = sorted({key for key in keys if key is not None}, key=_order)
    place = {key: index for index, key in enumerate(known)}
    return [None if key is None else place[key] for key in keys]


def _order(key: float | str) -> tuple[int, float, list[tuple[int, int, str]]]:
    """Sort figures by value; text by its words, in which numbers count as numbers."""
    if not isinstance(key, str):
        return (0, float(key), [])
    pieces = "".join(c if c.isalnum() else " " for c in key.lower()).split()
    return (1, 0.0, [_piece(piece) for piece in pieces])


def _piece(word: str) -> tuple[int, int, str]:
    return (0, int(word), "") if word.isdecimal() else (1, 0, word)
