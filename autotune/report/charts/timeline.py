"""When each launch ran and how its trials ended."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from autotune.report import words
from autotune.report.charts.figure import MAX_MARKS, Chart, Figure, label, layout, strategy_of
from autotune.report.study import Study
from autotune.trial.protocol import Outcome
from autotune.trial.record import TrialRecord

_MARKS = {
    Outcome.OK: ("circle", "@accent"),
    Outcome.OOM: ("x", "@bad"),
    Outcome.HOST_OOM: ("cross", "@bad"),
    Outcome.TIMEOUT: ("triangle-up", "@s4"),
    Outcome.HANG: ("triangle-down", "@s4"),
    Outcome.CRASHED: ("diamond", "@s3"),
    Outcome.INVALID: ("square", "@s0"),
    Outcome.THRASH: ("star", "@s1"),
    Outcome.INTERRUPTED: ("circle-open", "@muted"),
}
"""Each outcome has a shape of its own: the colour only helps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Launch:
    """One start of all ranks and the trials it measured."""

    number: int
    strategy: str
    start: datetime
    seconds: float | None
    records: tuple[TrialRecord, ...]

    def at(self, share: float) -> str:
        """Return the time at a share of the launch, 0 to 1."""
        return (self.start + timedelta(seconds=share * (self.seconds or 0.0))).isoformat()


def timeline_chart(study: Study) -> Chart | None:
    """Launches as bars on a time axis, one row a strategy, one mark a trial."""
    launches = _launches(study.records)
    if not launches:
        return None
    step = max(1, -(-len(study.records) // MAX_MARKS))
    drawn = launches[::step]
    rows = sorted({launch.strategy for launch in launches}, reverse=True)
    figure = layout("UTC", "")
    figure["xaxis"]["type"] = "date"
    figure["yaxis"] |= {"type": "category", "categoryarray": [label(r) for r in rows]}
    thinning = f" Every {step}th launch is drawn." if step > 1 else ""
    return Chart(
        key="timeline",
        title="Launches over time",
        summary=f"{len(launches):,} launches, a bar each, and a mark for every configuration a "
        "launch tried, by how it ended. Marks stand in the order they ran; when within its launch "
        f"each of them ran is not recorded.{thinning}",
        figure={"data": [_bars(drawn), *_marks(drawn)], "layout": figure},
        height=150 + 36 * len(rows),
    )


def _launches(records: Sequence[TrialRecord]) -> list[_Launch]:
    groups: dict[int, list[TrialRecord]] = defaultdict(list)
    for record in records:
        groups[record.launch].append(record)
    launches = []
    for number, group in sorted(groups.items()):
        start = _time(group[0].started_at)
        if start is not None and _ends(start, group[0].launch_s):
            launches.append(
                _Launch(
                    number=number,
                    strategy=strategy_of(group[0]),
                    start=start,
                    seconds=group[0].launch_s,
                    records=tuple(group),
                )
            )
    return launches


def _time(text: str) -> datetime | None:
    try:
        time = datetime.fromisoformat(text)
        # plotly reads a time with an offset as one of the reader's own zone.
        return time.astimezone(UTC).replace(tzinfo=None) if time.tzinfo else time
    except (ValueError, OverflowError):
        return None


def _ends(start: datetime, seconds: float | None) -> bool:
    """Tell whether the calendar holds the end, which it does not past the year 9999."""
    try:
        start + timedelta(seconds=seconds or 0.0)
    except OverflowError:
        return False
    return True


def _bars(launches: Sequence[_Launch]) -> Figure:
    """One trace for all: a gap (None) ends each bar."""
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "launch",
        "x": [t for launch in launches for t in (launch.at(0), launch.at(1), None)],
        "y": [y for launch in launches for y in (*[label(launch.strategy)] * 2, None)],
        "line": {"width": 9, "color": "@line"},
        "hoverinfo": "skip",
        "showlegend": False,
    }


def _marks(launches: Sequence[_Launch]) -> list[Figure]:
    traces: list[Figure] = []
    for outcome, (symbol, colour) in _MARKS.items():
        found = [
            (launch.at((index + 1) / (len(launch.records) + 1)), launch, record)
            for launch in launches
            for index, record in enumerate(launch.records)
            if record.outcome is outcome
        ]
        if not found:
            continue
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": words.OUTCOME_WORDS[outcome],
                "x": [time for time, _, _ in found],
                "y": [label(launch.strategy) for _, launch, _ in found],
                "text": [_hover(launch, record) for _, launch, record in found],
                "hoverinfo": "text",
                "marker": {"size": 8, "symbol": symbol, "color": colour},
            }
        )
    return traces


def _hover(launch: _Launch, record: TrialRecord) -> str:
    took = f", {words.seconds(launch.seconds)}" if launch.seconds is not None else ""
    end = f"{words.rate(record.tokens_per_s)} tokens/s" if record.tokens_per_s else ""
    return "<br>".join(
        filter(
            None,
            (
                f"<b>{label(words.plan_name(record.plan))}</b>",
                f"launch {launch.number}{took}",
                words.OUTCOME_WORDS[record.outcome],
                end or label(words.first_line(record.message, 90)),
            ),
        )
    )
