"""A capacity plan on the terminal, from 60 columns on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from autotune.capacity import Answers, Calibration, Cell, Fit, Question
from autotune.report import capacity_words as words

_STYLE = {Fit.FITS: "green", Fit.AT_RISK: "yellow", Fit.OOM: "red", Fit.REFUSED: "red"}
_GAP = 3
"""What rich puts between two columns."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Column:
    header: str
    value: Callable[[Cell], str]
    is_number: bool = True
    wraps: bool = False

    def width(self, cells: Sequence[Cell]) -> int:
        """Return the least columns it needs without breaking a word."""
        texts = [self.header, *(self.value(cell) for cell in cells)]
        return max(len(word) for text in texts for word in (text.split() if self.wraps else [text]))


def print_capacity(
    console: Console,
    question: Question,
    cells: Sequence[Cell],
    answers: Answers,
    calibration: Calibration | None,
    workload: str,
) -> None:
    """Print the table, the answers, the reasons and what the figures rest on."""

    def say(text: str, style: str | None = None) -> None:
        console.print(text, style=style, highlight=False, markup=False)

    def say_of(label: str, text: str, style: str) -> None:
        console.print(Text.assemble((label, style), f": {text}"))

    say(words.title(question), style="bold")
    say(workload)
    for columns in _split(_columns(question), cells, console.width):
        console.print(_table(columns, cells))
    for label, text in words.answer_lines(question, answers):
        say_of(label, text, "bold")
    for names, reason in words.reasons(cells):
        say_of(names, reason, "red")
    for note in words.notes(question, cells, calibration):
        say(note, style="dim")


def _columns(question: Question) -> list[_Column]:
    """Return the columns, those first that answer the question."""
    columns = [
        _Column(header="fits", value=words.fit_words, is_number=False),
        _Column(header="tokens/s", value=lambda c: words.figure(c.tokens_per_s)),
        _Column(header="days", value=lambda c: words.figure(c.days)),
    ]
    if question.prices:
        columns.append(_Column(header="cost", value=lambda c: words.figure(c.cost)))
    if question.budget is not None:
        columns.append(
            _Column(header="budget buys", value=lambda c: words.count_words(c.tokens_in_budget))
        )
    if words.asks_what_the_deadline_allows(question):
        columns.append(_Column(header="tokens", value=lambda c: words.count_words(c.most_tokens)))
    if words.has_both_limits(question):
        columns.append(_Column(header="keeps", value=words.keeps, is_number=False))
    if question.with_power:
        columns.append(_Column(header="kWh", value=lambda c: words.figure(c.kwh)))
    return [
        *columns,
        _Column(header="GPU-h", value=lambda c: words.figure(c.gpu_hours)),
        _Column(header="GiB", value=words.memory_words),
        _Column(header="configuration", value=words.configuration, is_number=False, wraps=True),
        _Column(header="basis", value=lambda c: c.basis, is_number=False),
    ]


def _split(columns: Sequence[_Column], cells: Sequence[Cell], width: int) -> list[list[_Column]]:
    """Spread the columns over as many tables, one below the other, as the width asks for."""
    names = max(len(cell.describe()) for cell in cells) + _GAP
    tables: list[list[_Column]] = [[]]
    used = names
    for column in columns:
        needed = column.width(cells) + _GAP
        if tables[-1] and used + needed > width:
            tables.append([])
            used = names
        tables[-1].append(column)
        used += needed
    return tables


def _table(columns: Sequence[_Column], cells: Sequence[Cell]) -> Table:
    table = Table(box=box.SIMPLE, padding=(0, 1), pad_edge=False)
    table.add_column("GPUs", no_wrap=True)
    for column in columns:
        table.add_column(
            column.header,
            justify="right" if column.is_number else "left",
            no_wrap=not column.wraps,
        )
    before = None
    for cell in cells:
        if before not in (None, cell.gpu_type):
            table.add_section()
        before = cell.gpu_type
        texts = [
            Text(column.value(cell), style=_STYLE[cell.fit] if column.header == "fits" else "")
            for column in columns
        ]
        table.add_row(Text(cell.describe()), *texts)
    return table
