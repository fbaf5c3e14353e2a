"""The rows a page's script sorts and filters."""

from __future__ import annotations

from autotune.report.table import PAGE_ROWS, Cell, Column, Row, Table


def _table(keys, facets=None):
    rows = [
        Row(cells=(Cell(text=str(key), sort=key),), facets=((facets or {}).get(key, "x"),))
        for key in keys
    ]
    return Table(
        key="t", title="T", columns=[Column(title="K")], rows=rows, facets=["F"], example="x"
    )


def test_ranks_keep_the_order_of_figures_and_leave_out_what_was_not_measured():
    data = _table([2.5, None, 1000, 2.5, -1]).data()
    assert data["ranks"] == [[1, None, 2, 1, 0]]
    assert data["texts"] == [["2.5", "None", "1000", "2.5", "-1"]]


def test_numbers_within_names_count_as_numbers():
    names = ["zero2 mbs=16", "zero2 mbs=4", "Zero1 mbs=8"]
    assert _table(names).data()["ranks"] == [[2, 1, 0]]


def test_facets_are_places_in_the_list_of_values():
    data = _table(["a", "b", "c"], {"a": "ok", "b": "failed", "c": "ok"}).data()
    assert data["facetValues"] == [["failed", "ok"]]
    assert data["facets"] == [[1, 0, 1]]


def test_only_the_first_page_is_html():
    table = _table(range(PAGE_ROWS + 1))
    assert len(table.first_rows) == PAGE_ROWS
    assert len(table.data()["marks"]) == PAGE_ROWS + 1
