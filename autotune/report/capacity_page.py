"""`capacity.html`: one self-contained page that asks for nothing from anywhere."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from autotune.capacity import Answers, Calibration, Cell, Question
from autotune.report import capacity_words as words
from autotune.report.capacity_charts import build_charts
from autotune.report.capacity_files import GENERATOR
from autotune.report.files import write_whole
from autotune.report.html import _policy, _script_json
from autotune.spec.hardware import HardwareSpec
from autotune.units import format_bytes

_TEMPLATES = files("autotune.report") / "templates"


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """One column of the table: its text, and what it is sorted by ("" stays last)."""

    name: str
    text: Callable[[Cell], str]
    sort: Callable[[Cell], float | str | None]
    is_number: bool = True
    wraps: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One cell of the plan."""

    cells: tuple[tuple[str, float | str], ...]
    is_answer: bool
    failed: bool


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
    columns: Sequence[Column]
    rows: Sequence[Row]
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
    text = _render(question, cells, _build(question, cells, answers, calibration, workload))
    write_whole(path, text)


def _render(question: Question, cells: Sequence[Cell], page: Page) -> str:
    import jinja2
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    charts = build_charts(question, cells)
    scripts = [_template("capacity.js")]
    if charts:
        scripts.insert(0, get_plotlyjs())
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.from_string(_template("capacity.html.j2")).render(
        page=page,
        charts=charts,
        figures=Markup(_script_json({chart.key: chart.figure for chart in charts})),
        style=Markup(_template("report.css")),
        scripts=[Markup(script) for script in scripts],
        policy=_policy(scripts),
        generator=GENERATOR,
    )


def _template(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def _build(
    question: Question,
    cells: Sequence[Cell],
    answers: Answers,
    calibration: Calibration | None,
    workload: str,
) -> Page:
    label, cell = _main_answer(question, answers)
    columns = _columns(question)
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
        columns=columns,
        rows=[
            Row(
                cells=tuple((c.text(each), _sort_key(c.sort(each))) for c in columns),
                is_answer=each is cell,
                failed=not each.runs,
            )
            for each in cells
        ],
        reasons=words.reasons(cells),
        notes=words.notes(question, cells, calibration),
        gpus=_gpus(question, cells),
        command=shlex.join(["autotune", *sys.argv[1:]]),
    )


def _main_answer(question: Question, answers: Answers) -> tuple[str, Cell]:
    if question.tokens is None and answers.most_tokens is not None:
        return "Most tokens for the budget", answers.most_tokens
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
    if cell.tokens_in_budget is not None:
        tiles.append(("Tokens", words.count_words(cell.tokens_in_budget), "within the budget"))
    return tiles


def _memory_tile(cell: Cell) -> tuple[str, str]:
    if cell.best is None or cell.hardware is None:
        return words.NO_FIGURE, ""
    return (
        format_bytes(cell.best.memory.total_bytes),
        f"of {format_bytes(cell.hardware.gpu.memory_bytes)} on each GPU",
    )


def _columns(question: Question) -> list[Column]:
    def number(name: str, value: Callable[[Cell], float | None]) -> Column:
        return Column(name=name, text=lambda c: words.figure(value(c)), sort=value)

    def text(name: str, value: Callable[[Cell], str]) -> Column:
        return Column(name=name, text=value, sort=value, is_number=False)

    def memory(cell: Cell) -> float | None:
        return cell.best.memory.total_bytes if cell.best else None

    columns = [
        text("GPU", lambda c: c.gpu_type),
        Column(name="GPUs", text=lambda c: str(c.num_gpus), sort=lambda c: c.num_gpus),
        text("Fits", words.fit_words),
        number("Tokens/s", lambda c: c.tokens_per_s),
    ]
    if question.budget is not None:
        columns.append(
            Column(
                name="Budget buys",
                text=lambda c: words.count_words(c.tokens_in_budget),
                sort=lambda c: c.tokens_in_budget,
            )
        )
    columns += [number("Days", lambda c: c.days), number("GPU-hours", lambda c: c.gpu_hours)]
    if question.prices:
        columns.append(number("Cost", lambda c: c.cost))
    if question.with_power:
        columns.append(number("kWh", lambda c: c.kwh))
    return [
        *columns,
        Column(name="Memory, GiB", text=words.memory_words, sort=memory),
        Column(
            name="Configuration",
            text=words.configuration,
            sort=words.configuration,
            is_number=False,
            wraps=True,
        ),
        text("Basis", lambda c: c.basis),
    ]


def _sort_key(value: float | str | None) -> float | str:
    return "" if value is None or value == words.NO_FIGURE else value


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
