"""The figures the estimator is held to, each from rows that were measured."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
NOT_MEASURED = "not measured"


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One line of the table."""

    name: str
    value: float | None
    """None: nothing was measured."""
    least: float | None = None
    most: float | None = None
    percent: bool = True
    of: str = ""
    """What it was computed from, or why it was not."""

    @property
    def verdict(self) -> str:
        """``pass``, ``short`` or ``not measured``."""
        if self.value is None:
            return NOT_MEASURED
        high = self.most is None or self.value <= self.most
        low = self.least is None or self.value >= self.least
        return "pass" if high and low else "short"

    @property
    def target(self) -> str:
        """The bounds in words."""
        if self.least is not None and self.most is not None:
            return f"{self._text(self.least)} to {self._text(self.most)}"
        if self.most is not None:
            return f"at most {self._text(self.most)}"
        return f"at least {self._text(self.least)}"

    @property
    def text(self) -> str:
        """The value in words."""
        return "-" if self.value is None else self._text(self.value)

    def _text(self, value: float | None) -> str:
        assert value is not None
        if self.percent:
            return f"{100 * value:.1f}%"
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def median(errors: Iterable[float]) -> float:
    """Return the median of the absolute errors."""
    return statistics.median(abs(e) for e in errors)


def percentile_95(errors: Iterable[float]) -> float:
    """Return the 95th percentile of the absolute errors, the next measured one above it."""
    ordered = sorted(abs(e) for e in errors)
    return ordered[min(len(ordered) - 1, -(-95 * len(ordered) // 100) - 1)]


def worst_under(errors: Iterable[float]) -> float:
    """Return by how much of the measured peak the prediction was too low, at worst."""
    return max(0.0, -min(errors))


def ranks(rows: Sequence[Row]) -> list[Figure]:
    """Return the figures of runs on CPU ranks, of the architectures held out."""
    held = [row for row in rows if row["split"] == "held_out"]
    found = []
    for column, words in (("error", "gross"), ("error_net_of_buckets", "net of fixed buffers")):
        errors = [float(row[column]) for row in held]
        of = f"{len(held)} runs of held-out architectures, of {len(rows)}"
        for name, how, bound in (
            ("median |error|", median, 0.03),
            ("95th percentile of |error|", percentile_95, 0.08),
            ("worst under-prediction", worst_under, 0.08),
        ):
            found.append(
                Figure(
                    name=f"CPU ranks, {words}: {name}",
                    value=how(errors) if errors else None,
                    most=bound,
                    of=of,
                )
            )
    found.append(
        Figure(name="CPU ranks: configurations measured", value=float(len(rows)), least=60,
               percent=False, of="rows of ranks_measured.csv")
    )  # fmt: skip
    return found


def published(rows: Sequence[Row]) -> list[Figure]:
    """Return the figures of the published rows that state their configuration fully."""
    scored = [row for row in rows if row["use"] == "scored"]
    found = [
        Figure(
            name="published, fully stated: median |error|",
            value=median(float(row["error"]) for row in scored) if scored else None,
            most=0.08,
            of=f"{len(scored)} rows",
        )
    ]
    for metric in ("allocated", "reserved"):
        errors = [float(row["error"]) for row in scored if row["metric"] == metric]
        if errors:
            found.append(
                Figure(name=f"published, fully stated, {metric} bytes: median |error|",
                       value=median(errors), most=0.08, of=f"{len(errors)} rows")
            )  # fmt: skip
    recall, precision, of = classification(rows, "oom_stated")
    found.append(Figure(name="stated out of memory: recall", value=recall, least=0.95, of=of))
    found.append(Figure(name="stated out of memory: precision", value=precision, least=0.9, of=of))
    return found


def classification(rows: Sequence[Row], use: str) -> tuple[float | None, float | None, str]:
    """Return recall and precision of calling rows out of memory.

    Args:
        rows: predicted ones; those that ran are the fully stated ones.
        use: which rows did not fit: ``oom_stated`` or ``oom_inferred``.
    """
    failed = [row for row in rows if row["use"] == use and row["called_oom"] != ""]
    ran = [row for row in rows if row["use"] == "scored" and row["called_oom"] != ""]
    if not failed:
        return None, None, "no rows"
    caught = sum(row["called_oom"] == "yes" for row in failed)
    wrong = sum(row["called_oom"] == "yes" for row in ran)
    of = f"{len(failed)} rows that ran out of memory, {len(ran)} that ran"
    return caught / len(failed), caught / max(1, caught + wrong), of


def peers(rows: Sequence[Row], names: Mapping[str, bool]) -> list[Figure]:
    """Return how many times smaller our median error is than each peer's, on common points.

    Args:
        rows: with a column of bytes a peer, empty where it has no answer.
        names: of the peers, and whether each models activations.
    """
    found = []
    for name, activations in names.items():
        common = [row for row in rows if row[name] != "" and row["measured_bytes"] != ""]
        if not common:
            found.append(Figure(name=f"ahead of {name}", value=None, least=1, percent=False))
            continue
        theirs, ours = (median(_errors(common, column)) for column in (name, "autotune"))
        words = "" if activations else ", which models no activations"
        found.append(
            Figure(
                name=f"times closer than {name}{words}",
                value=theirs / ours,
                least=1.0 if activations else 3.0,
                percent=False,
                of=f"{len(common)} points: {100 * theirs:.1f}% against {100 * ours:.1f}%",
            )
        )
    return found


def _errors(rows: Sequence[Row], column: str) -> list[float]:
    return [float(row[column]) / float(row["measured_bytes"]) - 1 for row in rows]


def gpu(files: Iterable[Path]) -> list[Figure]:
    """Return the figures of CUDA GPUs' rows (`gpu.py`), or that there are none."""
    rows = [row for file in files for row in _read(file)]
    errors = [float(row["memory_error"]) for row in rows if row["memory_error"]]
    ran_out = [row for row in rows if row["outcome"] == "oom"]
    wrong = sum(row["predicted_verdict"] == "fits" for row in ran_out)
    of = f"{len(rows)} configurations" if rows else "no CUDA GPU"
    return [
        Figure(name="CUDA GPU: median |error| of allocated bytes",
               value=median(errors) if errors else None, most=0.03, of=of),
        Figure(name="CUDA GPU: worst under-prediction",
               value=worst_under(errors) if errors else None, most=0.08, of=of),
        Figure(name="CUDA GPU: out of memory, but called fits",
               value=float(wrong) if rows else None, most=0, percent=False, of=of),
    ]  # fmt: skip


def speed(file: Path) -> list[Figure]:
    """Return the seconds that `speed.py` measured."""
    return [
        Figure(name=f"seconds: {row['what']}", value=float(row["median_s"]),
               most=float(row["target_s"]), percent=False, of=f"median of {row['runs']}")
        for row in _read(file)
    ]  # fmt: skip


def coverage(covered: int, rows: int) -> Figure:
    """Return how often the 90% interval holds what was measured."""
    share = covered / rows if rows else None
    of = f"{rows} runs on CPU ranks, each architecture from the others' records"
    return Figure(name="90% interval: coverage", value=share, least=0.85, most=0.97, of=of)


def _read(file: Path) -> list[Row]:
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as text:
        return list(csv.DictReader(text))


def table(figures: Sequence[Figure]) -> str:
    """Return the figures as aligned lines."""
    lines = [(f.name, f.text, f.target, f.verdict, f.of) for f in figures]
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    return "\n".join(
        "  ".join([*(line[i].ljust(widths[i]) for i in range(4)), line[4]]).rstrip()
        for line in lines
    )
