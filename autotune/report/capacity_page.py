"""`capacity.html`: one self-contained page that asks for nothing from anywhere."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from autotune.capacity import Answers, Calibration, Cell, Question
from autotune.report import capacity_words as words
from autotune.report.capacity_charts import build_charts
from autotune.report.capacity_files import GENERATOR
from autotune.report.files import write_whole
from autotune.report.html import render_page
from autotune.report.table import Cell as TableCell
from autotune.report.table import Column, Row, Table
from autotune.spec.hardware import HardwareSpec
from autotune.units import format_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class _Value:
    """What one column of the table shows of a cell, and what it is sorted by (None stays last)."""

    name: str
    text: Callable[[Cell], str]
    sort: Callable[[Cell], float | str | None]
    kind: str = "num"


@dataclass(frozen=True, kw_only=True, slots=True)
class Headline:
    """The cell most of the question is about."""

    label: str
    name: str
    configuration: str
    tiles: Sequence[tuple[str, str, str]]
    """Label, figure, and the line below it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """Everything the template prints."""

    title: str
    subtitle: str
    headline: Headline
    answers: Sequence[tuple[str, str]]
    table: Table
    reasons: Sequence[tuple[str, str]]
    notes: Sequence[str]
    gpus: Sequence[tuple[str, Sequence[tuple[str, str]]]]
    command: str


def write_page(
    question: Question,
    cells: Sequence[Cell],
    answers: Answers,
    calibration: Calibration | None,
    path: Path,
    workload: str,
) -> None:
    """Write the page; it appears whole or not at all."""
    page = _build(question, cells, answers, calibration, workload)
    text = render_page(
        "capacity.html.j2",
        charts=build_charts(question, cells),
        tables=[page.table],
        page=page,
        generator=GENERATOR,
    )
    write_whole(path, text)


def _build(
    question: Question,
    cells: Sequence[Cell],
    answers: Answers,
    calibration: Calibration | None,
    workload: str,
) -> Page:
    label, cell = _main_answer(question, answers)
    return Page(
        title=words.title(question),
        subtitle=workload,
        headline=Headline(
            label=label,
            name=cell.describe(),
            configuration=words.configuration(cell),
            tiles=_tiles(cell),
        ),
        answers=words.answer_lines(question, answers),
        table=_table(question, cells, cell),
        reasons=words.reasons(cells),
        notes=words.notes(question, cells, calibration),
        gpus=_gpus(question, cells),
        command=shlex.join(["autotune", *sys.argv[1:]]),
    )


def _main_answer(question: Question, answers: Answers) -> tuple[str, Cell]:
    if question.tokens is None and answers.most_tokens is not None:
        return f"Most tokens {words.limit_words(question)}", answers.most_tokens
    if answers.cheapest_in_both is not None:
        return "Cheapest within budget and deadline", answers.cheapest_in_both
    if question.deadline_s is not None and answers.in_time is not None:
        priced = "Cheapest" if answers.in_time.cost is not None else "Fewest GPU-hours"
        return f"{priced} that meets the deadline", answers.in_time
    if answers.cheapest is not None and question.deadline_s is None:
        return "Cheapest that fits", answers.cheapest
    return "Fastest that fits", answers.fastest


def _tiles(cell: Cell) -> list[tuple[str, str, str]]:
    tiles = [
        ("Throughput", words.figure(cell.tokens_per_s), f"tokens/s, {cell.basis}"),
        ("Memory", *_memory_tile(cell)),
        ("Days", words.figure(cell.days), f"{words.figure(cell.gpu_hours)} GPU-hours"),
    ]
    if cell.cost is not None:
        tiles.append(("Cost", words.figure(cell.cost), f"{words.figure(cell.price)} a GPU-hour"))
    if cell.kwh is not None:
        tiles.append(("Energy", f"{words.figure(cell.kwh)} kWh", "boards at their TDP"))
    if cell.question.budget is not None or cell.question.tokens is None:
        limit = words.limit_words(cell.question)
        tiles.append(("Tokens", words.count_words(cell.most_tokens), limit))
    return tiles


def _memory_tile(cell: Cell) -> tuple[str, str]:
    if cell.best is None or cell.hardware is None:
        return words.NO_FIGURE, ""
    return (
        format_bytes(cell.best.memory.total_bytes),
        f"of {format_bytes(cell.hardware.gpu.memory_bytes)} on each GPU",
    )


def _table(question: Question, cells: Sequence[Cell], answer: Cell) -> Table:
    values = _values(question)
    return Table(
        key="cells",
        title="Every cell",
        columns=[Column(title=value.name, kind=value.kind) for value in values],
        rows=[_row(values, cell, cell is answer) for cell in cells],
        facets=("GPU", "Fits"),
        example=f"{answer.gpu_type} {answer.best.plan.strategy}"
        if answer.best
        else answer.gpu_type,
    )


def _row(values: Sequence[_Value], cell: Cell, is_answer: bool) -> Row:
    return Row(
        cells=tuple(TableCell(text=v.text(cell), sort=_sort_key(v.sort(cell))) for v in values),
        facets=(cell.gpu_type, words.FIT_WORDS[cell.fit]),
        mark="winner" if is_answer else "" if cell.runs else "failed",
        tag="answer" if is_answer else "",
    )


def _sort_key(value: float | str | None) -> float | str | None:
    return None if value == words.NO_FIGURE else value


def _values(question: Question) -> list[_Value]:
    def number(name: str, value: Callable[[Cell], float | None]) -> _Value:
        return _Value(name=name, text=lambda c: words.figure(value(c)), sort=value)

    def text(name: str, value: Callable[[Cell], str]) -> _Value:
        return _Value(name=name, text=value, sort=value, kind="text")

    def memory(cell: Cell) -> float | None:
        return cell.best.memory.total_bytes if cell.best else None

    columns = [
        text("GPU", lambda c: c.gpu_type),
        _Value(name="GPUs", text=lambda c: str(c.num_gpus), sort=lambda c: c.num_gpus),
        text("Fits", words.fit_words),
        number("Tokens/s", lambda c: c.tokens_per_s),
    ]
    if question.budget is not None:
        columns.append(
            _Value(
                name="Budget buys",
                text=lambda c: words.count_words(c.tokens_in_budget),
                sort=lambda c: c.tokens_in_budget,
            )
        )
    if words.asks_what_the_deadline_allows(question):
        columns.append(
            _Value(
                name="Tokens",
                text=lambda c: words.count_words(c.most_tokens),
                sort=lambda c: c.most_tokens,
            )
        )
    if words.has_both_limits(question):
        columns.append(text("Keeps", words.keeps))
    columns += [number("Days", lambda c: c.days), number("GPU-hours", lambda c: c.gpu_hours)]
    if question.prices:
        columns.append(number("Cost", lambda c: c.cost))
    if question.with_power:
        columns.append(number("kWh", lambda c: c.kwh))
    return [
        *columns,
        _Value(name="Memory, GiB", text=words.memory_words, sort=memory),
        _Value(
            name="Configuration",
            text=words.configuration,
            sort=words.configuration,
            kind="long",
        ),
        text("Basis", lambda c: c.basis),
    ]


def _gpus(question: Question, cells: Sequence[Cell]) -> list[tuple[str, Sequence[tuple[str, str]]]]:
    by_type: dict[str, HardwareSpec] = {}
    for cell in cells:
        if cell.hardware is not None:
            by_type.setdefault(cell.gpu_type, cell.hardware)
    return [(name, _facts(question, name, hardware)) for name, hardware in by_type.items()]


def _facts(question: Question, name: str, hardware: HardwareSpec) -> list[tuple[str, str]]:
    gpu = hardware.gpu
    peak = ", ".join(f"{p} {value / 1e12:,.4g}" for p, value in gpu.peak_flops.items())
    facts = [
        ("Memory", format_bytes(gpu.memory_bytes)),
        ("Memory bandwidth", f"{gpu.hbm_bytes_per_s / 1e12:.4g} TB/s"),
        ("Dense peak, TFLOP/s", peak),
        ("Link in a node", f"{hardware.intra_node.bytes_per_s / 1e9:.4g} GB/s each way"),
        ("Host link", f"{gpu.host_link.bytes_per_s / 1e9:.4g} GB/s each way"),
    ]
    if gpu.power_w is not None:
        facts.append(("Board power", f"{gpu.power_w:.4g} W"))
    if name in question.prices:
        facts.append(("Price of a GPU-hour", words.figure(question.prices[name])))
    return [*facts, ("Sources", gpu.source)]
