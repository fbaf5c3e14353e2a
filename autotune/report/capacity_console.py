"""A capacity plan on the terminal, from 60 columns on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from autotune.capacity import Answers, Calibration, Cell, Fit, Question
from autotune.report import capacity_words as words

_STYLE = {Fit.FITS: "green", Fit.AT_RISK: "yellow", Fit.OOM: "red", Fit.REFUSED: "red"}
_WIDE = 120
Column = tuple[str, Callable[[Cell], str]]


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

    say(words.title(question), style="bold")
    say(workload)
    wide = console.width >= _WIDE
    console.print(_table(question, cells, wide=wide))
    if not wide:
        console.print(_configurations(cells))
    for label, text in words.answer_lines(question, answers):
        console.print(f"[bold]{escape(label)}[/]: {escape(text)}", highlight=False)
    for names, reason in words.reasons(cells):
        console.print(f"[red]{escape(names)}[/]: {escape(reason)}", highlight=False)
    for note in words.notes(question, cells, calibration):
        say(note, style="dim")


def _table(question: Question, cells: Sequence[Cell], *, wide: bool) -> Table:
    table = Table(box=box.SIMPLE, padding=(0, 1), pad_edge=False)
    table.add_column("GPUs", no_wrap=wide)
    if wide:
        table.add_column("configuration")
    table.add_column("fits", no_wrap=wide)
    columns = _figures(question, wide)
    for header, _ in columns:
        table.add_column(header, justify="right", no_wrap=True)
    if wide:
        table.add_column("basis", no_wrap=True)
    before = None
    for cell in cells:
        if before not in (None, cell.gpu_type):
            table.add_section()
        before = cell.gpu_type
        fit = f"[{_STYLE[cell.fit]}]{words.fit_words(cell)}[/]"
        row = [escape(cell.describe()), fit, *(value(cell) for _, value in columns)]
        if wide:
            row[1:1] = [words.configuration(cell)]
            row.append(cell.basis)
        table.add_row(*row)
    return table


def _configurations(cells: Sequence[Cell]) -> Table:
    """Return what has no room beside the figures."""
    table = Table(box=box.SIMPLE, padding=(0, 1), pad_edge=False)
    table.add_column("GPUs", no_wrap=True)
    table.add_column("configuration")
    table.add_column("basis", no_wrap=True)
    for cell in cells:
        if cell.best is not None:
            name = escape(cell.describe())
            table.add_row(name, escape(words.configuration(cell)), cell.basis)
    return table


def _figures(question: Question, wide: bool) -> list[Column]:
    columns: list[Column] = [("tokens/s", lambda c: words.figure(c.tokens_per_s))]
    if wide:
        columns.append(("GiB", words.memory_words))
    if question.budget is not None:
        columns.append(("budget buys", lambda c: words.count_words(c.tokens_in_budget)))
    columns.append(("days", lambda c: words.figure(c.days)))
    if wide or not question.prices:
        columns.append(("GPU-h", lambda c: words.figure(c.gpu_hours)))
    if question.prices and (wide or question.tokens is not None):
        columns.append(("cost", lambda c: words.figure(c.cost)))
    if question.with_power:
        columns.append(("kWh", lambda c: words.figure(c.kwh)))
    return columns
