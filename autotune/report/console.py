"""What the terminal shows: the search while it runs, and the answer at its end."""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Callable, Iterable

from rich.console import Console, Group
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from autotune.report import words
from autotune.report.answer import advise, explain, find_answer, relative_half_width, standings
from autotune.report.study import Study
from autotune.trial.protocol import Outcome
from autotune.trial.record import TrialRecord
from autotune.units import format_duration

_MAX_TABLE_ROWS = 12
_WIDE_COLUMNS = 110


class LiveProgress:
    """The search as it runs, on stderr.

    On a terminal a few lines at the bottom are kept up to date (what runs, for how long, the best
    so far, time left) and each event scrolls by above them. Elsewhere (a pipe, a log file, a dumb
    terminal) there is one plain line an event and nothing else. `stop` must be called, also when
    the search fails: put it in a ``finally``.
    """

    def __init__(
        self, console: Console | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Use `console` (default: stderr) and `clock` (seconds)."""
        self._console = console or Console(file=sys.stderr)
        self._clock = clock
        self._live: Live | None = None
        self._started_at = clock()
        self._total_launches: int | None = None
        self._budget_s: float | None = None
        self._launches_expected: int | None = None
        self._launches_done = 0
        """By this search, without those before a resume."""
        self._last_launch = 0
        self._num_ok = 0
        self._num_failed = 0
        self._best: TrialRecord | None = None
        self._running: tuple[int, str, float] | None = None

    def start(
        self,
        total_launches: int | None,
        budget_s: float | None,
        *,
        known: Iterable[TrialRecord] = (),
        launches_left: int | None = None,
    ) -> None:
        """Begin.

        Args:
            total_launches: Launches of the study, those before a resume included.
            budget_s: Seconds of this search.
            known: Records from before a resume; they count, and one of them may be the best.
            launches_left: Launches this search will make if neither budget nor interrupt ends it.
        """
        for record in known:
            self._count(record)
            self._last_launch = max(self._last_launch, record.launch)
        self._started_at = self._clock()
        self._total_launches = total_launches
        self._budget_s = budget_s
        self._launches_expected = launches_left
        if self._launches_expected is None and total_launches is not None:
            self._launches_expected = max(0, total_launches - self._last_launch)
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(
                console=self._console,
                get_renderable=self._render,
                refresh_per_second=2,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()

    def launch_started(self, n: int, description: str) -> None:
        """All ranks of launch `n` (from 1) are being started."""
        self._running = (n, words.first_line(description), self._clock())
        if self._live is None:
            self._line(f"{self._counter(n)} running {self._running[1]}")

    def rung_done(self, record: TrialRecord) -> None:
        """One micro batch of the running launch has been measured, or has failed."""
        name = words.plan_name(record.plan)
        is_best = self._count(record)
        if record.outcome is not Outcome.OK:
            reason = words.first_line(record.message, 100)
            outcome = words.OUTCOME_WORDS[record.outcome]
            self._line(f"{name}: {outcome}" + (f": {reason}" if reason else ""), "yellow", indent=2)
            return
        self._line(f"{name}: {_figures(record)}" + ("  best so far" if is_best else ""), indent=2)

    def _count(self, record: TrialRecord) -> bool:
        """Count a record; tell whether it is the best so far."""
        if record.outcome is not Outcome.OK:
            self._num_failed += 1
            return False
        self._num_ok += 1
        best = (self._best.tokens_per_s if self._best else None) or 0.0
        if (record.tokens_per_s or 0.0) <= best:
            return False
        self._best = record
        return True

    def launch_done(self, n: int) -> None:
        """Launch `n` has ended and its ranks are gone."""
        self._launches_done += 1
        self._last_launch = n
        took = f" in {format_duration(self._clock() - self._running[2])}" if self._running else ""
        self._running = None
        if self._live is None:
            left = self._time_left()
            self._line(f"{self._counter(n)} done{took}" + (f", {left}" if left else ""))

    def note(self, text: str) -> None:
        """Tell something about the search itself."""
        self._line(words.clean(text))

    def stop(self) -> None:
        """End; the lines at the bottom are taken away. Safe to call twice."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _line(self, text: str, style: str = "", indent: int = 0) -> None:
        if self._console.is_terminal:
            line = Padding(Text(text, style=style), (0, 0, 0, indent), expand=False)
            self._console.print(line, highlight=False)
        else:
            # A line stays one line, however long: it is read by grep.
            line_text = Text(" " * indent + text)
            self._console.print(line_text, soft_wrap=True, highlight=False)

    def _counter(self, n: int) -> str:
        return f"[{n}/{self._total_launches}]" if self._total_launches else f"[{n}]"

    def _time_left(self) -> str:
        elapsed = self._clock() - self._started_at
        if self._budget_s is not None:
            return f"{format_duration(max(0.0, self._budget_s - elapsed))} of the budget left"
        if self._launches_expected is not None and self._launches_done:
            each = elapsed / self._launches_done
            remaining = max(0, self._launches_expected - self._launches_done)
            return f"about {format_duration(each * remaining)} left"
        return ""

    def _render(self) -> Group:
        elapsed = format_duration(self._clock() - self._started_at)
        lines = [
            ("time", ", ".join(filter(None, [elapsed, self._time_left()]))),
            ("trials", f"{self._num_ok} measured, {self._num_failed} failed"),
            ("best", self._best_line()),
            ("now", self._now_line()),
        ]
        texts = [
            Text.assemble((f"{key:<7}", "dim"), value, no_wrap=True, overflow="ellipsis")
            for key, value in lines
        ]
        # A bar alone does not end its line; a grid's row does.
        bar = Table.grid()
        bar.add_row(ProgressBar(total=1.0, completed=self._share_done(), width=self._bar_width()))
        return Group(bar, *texts)

    def _bar_width(self) -> int:
        return min(60, self._console.width)

    def _share_done(self) -> float:
        """Return the larger of the two shares: whichever limit comes first ends the search."""
        shares = [0.0]
        if self._total_launches:
            shares.append(self._last_launch / self._total_launches)
        elif self._launches_expected:
            shares.append(self._launches_done / self._launches_expected)
        if self._budget_s:
            shares.append((self._clock() - self._started_at) / self._budget_s)
        return min(1.0, max(shares))

    def _best_line(self) -> str:
        if self._best is None:
            return "nothing has run to the end yet"
        return f"{words.plan_name(self._best.plan)}: {_figures(self._best)}"

    def _now_line(self) -> str:
        if self._running is None:
            return "choosing what to run next"
        n, description, since = self._running
        elapsed = format_duration(self._clock() - since)
        return f"{self._counter(n)} {elapsed}  {description}"


def print_result(study: Study, console: Console) -> None:
    """Print the answer, why it won, and the fastest configurations as a table."""
    answer = find_answer(study)
    for note in study.notes:
        console.print(Text(f"note: {note}", style="yellow"))
    if answer.winner is None:
        console.print(Text("No configuration ran to the end.", style="bold"))
        for sentence in advise(study):
            print_indented(console, words.clean(sentence))
        return
    console.print(_ranking(study, wide=console.width >= _WIDE_COLUMNS))
    ran = standings(study.records)
    failed = sum(record.outcome is not Outcome.OK for record in study.records)
    tail = f"{len(ran)} configurations ran, {failed} failed, {len(study.rejected)} refused unrun."
    if len(ran) > _MAX_TABLE_ROWS:
        tail += f" The {_MAX_TABLE_ROWS} fastest are shown."
    console.print(Text(tail, style="dim"))
    if any(words.is_composed(record) for record in ran[:_MAX_TABLE_ROWS]):
        console.print(Text(words.COMPOSED_NOTE, style="dim"))
    head = "Best" if answer.is_final else "Best so far (the search has not ended)"
    console.print()
    console.print(Text(f"{head}: {words.plan_name(answer.winner.plan)}", style="bold"))
    print_indented(console, _figures(answer.winner))
    for sentence in explain(answer):
        print_indented(console, sentence)


def print_indented(console: Console, text: str) -> None:
    """Print a paragraph two columns in, without the spaces rich would fill its lines up with."""
    for line in textwrap.wrap(text, max(20, console.width - 2)):
        console.print(Text(f"  {line}"), soft_wrap=True)


def _ranking(study: Study, *, wide: bool) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("configuration", overflow="fold")
    table.add_column("tokens/s", justify="right", no_wrap=True)
    table.add_column("\N{PLUS-MINUS SIGN}", justify="right", no_wrap=True)
    if wide:
        table.add_column("step", justify="right", no_wrap=True)
    table.add_column("memory", justify="right", no_wrap=True)
    if wide:
        table.add_column("predicted", justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
    winner = find_answer(study).winner
    for record in standings(study.records)[:_MAX_TABLE_ROWS]:
        composed = words.is_composed(record)
        half = relative_half_width(record)
        cells = [
            words.plan_name(record.plan),
            words.rate(record.tokens_per_s, composed),
            words.NOT_MEASURED if half is None else words.percent(half),
            words.seconds(record.step_s, composed),
            words.size(words.memory_bytes(record)),
            words.size(record.predicted_bytes),
        ]
        is_winner = winner is not None and record.plan_id == winner.plan_id
        cells.append("best" if is_winner else "")
        if not wide:
            cells = [cells[0], cells[1], cells[2], cells[4]]
        table.add_row(*(Text(cell) for cell in cells), style="bold" if is_winner else "")
    return table


def _figures(record: TrialRecord) -> str:
    composed = words.is_composed(record)
    parts = [f"{words.rate(record.tokens_per_s, composed)} tokens/s"]
    if (memory := words.memory_bytes(record)) is not None:
        parts.append(f"{words.size(memory)} a rank")
    parts.append(f"step {words.seconds(record.step_s, composed)}")
    if (half := relative_half_width(record)) is not None:
        parts.append(f"\N{PLUS-MINUS SIGN}{words.percent(half)}")
    return ", ".join(parts)
