"""Two studies side by side on the console, and the words the page shares with it."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from autotune.report import words
from autotune.report.compare import Comparison, Pair, sentences, warning
from autotune.report.console import print_indented
from autotune.report.differences import Kind
from autotune.trial.protocol import Outcome
from autotune.trial.record import TrialRecord

KIND_TITLES = {
    Kind.WORK: "The work",
    Kind.MACHINE: "The machine",
    Kind.VERSIONS: "Versions",
    Kind.SEARCH: "What was searched",
}
_MAX_ROWS = 20


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print what differs, the plans side by side, and what that shows."""
    for which, name in zip(("first", "second"), comparison.names, strict=True):
        console.print(Text(f"{which:<7} {name}"))
    if text := warning(comparison):
        console.print(Text(f"WARNING: {text}", style="bold red"))
    for kind, title in KIND_TITLES.items():
        found = [d for d in comparison.differences if d.kind is kind]
        if found:
            console.print(Text(f"{title} differed:", style="bold"))
        for d in found:
            line = f"{d.name}: {words.first_line(d.first)} against {words.first_line(d.second)}"
            print_indented(console, line)
    console.print()
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("configuration", overflow="fold")
    for title in ("first", "second", "ratio", "noise"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for pair in comparison.pairs[:_MAX_ROWS]:
        table.add_row(*(Text(text) for text in pair_texts(pair)))
    if comparison.pairs:
        console.print(table)
    if len(comparison.pairs) > _MAX_ROWS:
        more = len(comparison.pairs) - _MAX_ROWS
        console.print(Text(f"and {more:,} more in the page and the CSV", style="dim"))
    for sentence in sentences(comparison):
        console.print(Text(sentence))


def pair_texts(pair: Pair) -> list[str]:
    """Return name, both speeds or outcomes, ratio, noise and verdict."""
    return [
        words.plan_name(pair.first.plan),
        _speed_or_outcome(pair.first),
        _speed_or_outcome(pair.second),
        words.NOT_MEASURED if pair.ratio is None else f"{pair.ratio:.3f}",
        words.NOT_MEASURED if pair.noise is None else words.percent(pair.noise),
        str(pair.verdict),
    ]


def _speed_or_outcome(record: TrialRecord) -> str:
    if record.outcome is not Outcome.OK:
        return words.OUTCOME_WORDS[record.outcome]
    return words.rate(record.tokens_per_s, words.is_composed(record))
