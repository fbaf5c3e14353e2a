"""Put the figures and the plots of the replay into docs/search.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from recorded import recorded

PAGE = Path(__file__).parents[2] / "docs" / "search.md"

Figure = dict[str, Any]


def write_page(
    figures: Sequence[Figure], landscapes: Sequence[str], samplers: Sequence[str]
) -> None:
    """Write the judged figures, a table of samplers a landscape, and the plots."""
    blocks = [_judged(figures, landscapes, samplers)]
    for name in landscapes:
        blocks += [f"\n`{name}`, all samplers:\n", _of(figures, name, samplers)]
    head = ["figure", "value", "bar", "", "by"]
    rows = [
        [one.figure, f"{one.value:.3f}", one.bar, "pass" if one.passed else "**short**",
         f"`{one.command}`"]
        for one in recorded()
    ]  # fmt: skip
    blocks += [
        "\nMeasured by other benchmarks:\n",
        _table(head, rows),
    ]
    plots = "\n".join(f"![regret on {name}](images/regret-{name}.png)\n" for name in landscapes)
    text = PAGE.read_text()
    for name, block in (("figures", "\n".join(blocks)), ("plots", plots)):
        start = f"<!-- {name}: written by make bench-search -->"
        end = f"<!-- end of {name} -->"
        before, _, rest = text.partition(start)
        text = f"{before}{start}\n{block}\n{end}{rest.partition(end)[2]}"
    PAGE.write_text(text)


def _judged(figures: Sequence[Figure], landscapes: Sequence[str], samplers: Sequence[str]) -> str:
    """Return a row a figure, a column a landscape; of samplers only the judged one's."""
    by_name: dict[str, dict[str, Figure]] = {}
    for figure in figures:
        if figure["at_most"] is not None or _sampler(figure, samplers) is None:
            by_name.setdefault(figure["figure"], {})[figure["landscape"]] = figure
    rows = []
    for name, found in by_name.items():
        bar = next(iter(found.values()))["at_most"]
        cells = [_cell(found.get(landscape)) for landscape in landscapes]
        rows.append([name, "" if bar is None else f"{bar:g}", *cells])
    return _table(["figure", "at most", *(f"`{name}`" for name in landscapes)], rows)


def _of(figures: Sequence[Figure], landscape: str, samplers: Sequence[str]) -> str:
    """Return a row a sampler, a column a figure."""
    values: dict[str, dict[str, float]] = {}
    columns: dict[str, None] = {}
    for figure in figures:
        sampler = _sampler(figure, samplers)
        if figure["landscape"] == landscape and sampler is not None:
            name = figure["figure"].removesuffix(f", {sampler}")
            columns[name] = None
            values.setdefault(sampler, {})[name] = figure["value"]
    rows = [
        [f"`{sampler}`", *(f"{own[name]:.3f}" for name in columns)]
        for sampler, own in values.items()
    ]
    return _table(["sampler", *columns], rows)


def _sampler(figure: Figure, samplers: Sequence[str]) -> str | None:
    last = str(figure["figure"]).rpartition(", ")[2]
    return last if last in samplers else None


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return ""
    detail = f" ({figure['detail']})" if figure["detail"] else ""
    passed = {True: " pass", False: " **short**", None: ""}[figure["passed"]]
    return f"{figure['value']:.3f}{detail}{passed}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
