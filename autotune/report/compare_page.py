"""Two studies side by side, as a page and as CSV."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from autotune.report import words
from autotune.report.charts.figure import strategy_of
from autotune.report.charts.pairs import pairs_chart
from autotune.report.compare import Comparison, Pair, sentences, to_document, warning
from autotune.report.compare_console import KIND_TITLES, pair_texts
from autotune.report.files import write_whole
from autotune.report.html import render_page
from autotune.report.table import Cell, Column, Row, Table

CSV_MARK = "plan_id,configuration,outcome_first,"
"""How the header of the table begins."""
_CSV_COLUMNS = (
    "plan_id", "configuration", "outcome_first", "outcome_second", "tokens_per_s_first",
    "tokens_per_s_second", "ratio", "noise", "verdict", "memory_bytes_first", "memory_bytes_second",
)  # fmt: skip


def write_comparison(comparison: Comparison, path: Path) -> None:
    """Write the page; it appears whole or not at all."""
    chart = pairs_chart(comparison)
    table = _table(comparison)
    text = render_page(
        "compare.html.j2",
        charts=[chart] if chart else [],
        tables=[table] if table.rows else [],
        names=comparison.names,
        warning=warning(comparison),
        sentences=sentences(comparison),
        differences=[
            (title, [d for d in comparison.differences if d.kind is kind])
            for kind, title in KIND_TITLES.items()
        ],
        table=table,
        notes=[*comparison.first.notes, *comparison.second.notes],
    )
    write_whole(path, text)


def write_comparison_csv(comparison: Comparison, path: Path) -> None:
    """Write one row a plan that both studies tried; an empty cell was not measured."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_CSV_COLUMNS)
    for entry, pair in zip(to_document(comparison)["plans"], comparison.pairs, strict=True):
        writer.writerow(
            [
                entry["plan_id"],
                words.plan_name(entry["plan"]),
                *entry["outcomes"],
                *entry["tokens_per_s"],
                entry["ratio"],
                entry["noise"],
                entry["verdict"],
                words.memory_bytes(pair.first),
                words.memory_bytes(pair.second),
            ]
        )
    write_whole(path, text.getvalue())


def _table(comparison: Comparison) -> Table:
    columns = (
        Column(title="Configuration"),
        Column(title="First, tokens/s", kind="num"),
        Column(title="Second, tokens/s", kind="num"),
        Column(title="Second over first", kind="num"),
        Column(title="Noise", kind="num"),
        Column(title="Verdict"),
        Column(title="First, memory", kind="num"),
        Column(title="Second, memory", kind="num"),
    )
    return Table(
        key="pairs",
        title="The same plans side by side",
        columns=columns,
        rows=[_row(pair) for pair in comparison.pairs],
        facets=("Verdict", "Strategy"),
        example="zero2 mbs=4",
    )


def _row(pair: Pair) -> Row:
    texts = pair_texts(pair)
    memories = [words.memory_bytes(record) for record in (pair.first, pair.second)]
    sorts: tuple[float | str | None, ...] = (
        texts[0],
        pair.first.tokens_per_s,
        pair.second.tokens_per_s,
        pair.ratio,
        pair.noise,
        texts[5],
        *memories,
    )
    texts += [words.size(memory) for memory in memories]
    return Row(
        cells=tuple(Cell(text=t, sort=s) for t, s in zip(texts, sorts, strict=True)),
        facets=(texts[5], words.clean(strategy_of(pair.first))),
        mark="failed" if pair.ratio is None else "",
    )
