"""Figures of the search that other benchmarks measured: read from what they committed.

A replay cannot measure them; each names the command that does.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1]
LEAST_TIMES_LESS, MOST_REGRET = 4.0, 0.0
MOST_DIFFERENCE = 0.03
"""Between what is reported and what is trained, or the launches' own spread where that is more."""
MOST_TIME_ERROR, LEAST_RANK, MOST_PUBLISHED_ERROR = 0.10, 0.9, 0.12
MOST_FORK_OF_COLD, MOST_RANKING_S = 0.25, 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Recorded:
    figure: str
    value: float
    bar: str
    passed: bool
    command: str


def recorded() -> list[Recorded]:
    """Return the figures of the files that are there."""
    return [*_live(), *_time_model(), *_starts(), *_ranking()]


def _live() -> Iterator[Recorded]:
    rows = {row["figure"]: row["value"] for row in _rows("search/results/live_figures.csv")}
    if not rows:
        return
    command = "benchmarks/search/live.py"
    less, regret = float(rows["times_less"]), float(rows["regret_by_single_launches"])
    yield Recorded(
        figure="one cold launch each over the search, wall time", value=less,
        bar=f"at least {LEAST_TIMES_LESS:g}", passed=less >= LEAST_TIMES_LESS, command=command,
    )  # fmt: skip
    yield Recorded(
        figure="regret of the winner, live", value=regret, bar=f"at most {MOST_REGRET:g}",
        passed=regret <= MOST_REGRET, command=command,
    )  # fmt: skip
    for name, value in rows.items():
        said, _, plan = name.partition(", ")
        if said != "reported / trained":
            continue
        spread = float(rows[f"spread of training runs, {plan}"])
        allowed = max(MOST_DIFFERENCE, spread)
        yield Recorded(
            figure=name, value=float(value), bar=f"within {allowed:.0%}",
            passed=abs(float(value) - 1) <= allowed, command=command,
        )  # fmt: skip


def _time_model() -> Iterator[Recorded]:
    for row in _rows("time/landscapes.csv"):
        if row["model"] != "calibrated":
            continue
        error, rank = float(row["median_abs_error"]), float(row["spearman"])
        for figure, value, bar, passed in (
            ("error", error, f"at most {MOST_TIME_ERROR:g}", error <= MOST_TIME_ERROR),
            ("rank correlation", rank, f"at least {LEAST_RANK:g}", rank >= LEAST_RANK),
        ):
            yield Recorded(
                figure=f"time model calibrated, {row['landscape']}, {figure}", value=value,
                bar=bar, passed=passed, command="benchmarks/time/landscapes.py",
            )  # fmt: skip
    errors = [
        abs(float(row["error"]))
        for row in _rows("time/published_predicted.csv")
        if row["error"] and row["calibrates"] != "1"
    ]
    if errors:
        median = statistics.median(errors)
        yield Recorded(
            figure="time model, published A100 table, error", value=median,
            bar=f"at most {MOST_PUBLISHED_ERROR:g}", passed=median <= MOST_PUBLISHED_ERROR,
            command="benchmarks/time/published.py",
        )  # fmt: skip


def _starts() -> Iterator[Recorded]:
    rows = _rows("results/launch_start.csv")
    for engine in dict.fromkeys(row["engine"] for row in rows):
        medians = {
            start: statistics.median(
                float(row["ready_s"])
                for row in rows
                if (row["engine"], row["start"]) == (engine, start)
            )
            for start in ("cold", "fork")
        }
        ratio = medians["fork"] / medians["cold"]
        yield Recorded(
            figure=f"fork start over cold start, {engine}", value=ratio,
            bar=f"at most {MOST_FORK_OF_COLD:g}", passed=ratio <= MOST_FORK_OF_COLD,
            command="make bench-launch",
        )  # fmt: skip


def _ranking() -> Iterator[Recorded]:
    for row in _rows("results/time_speed.csv"):
        seconds = float(row["median_s"])
        yield Recorded(
            figure=f"{row['what']}, s", value=seconds,
            bar=f"at most {MOST_RANKING_S:g}", passed=seconds <= MOST_RANKING_S,
            command="benchmarks/time/speed.py",
        )  # fmt: skip


def _rows(name: str) -> list[dict[str, str]]:
    path = BENCHMARKS / name
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
