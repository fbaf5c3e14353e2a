"""The page's table of every configuration: measured, failed, refused, each with its reason."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autotune.report import words
from autotune.report.answer import Answer, relative_half_width
from autotune.report.reasons import Reasons, why_refused
from autotune.report.study import Study
from autotune.report.table import Cell, Column, Row, Table
from autotune.trial.protocol import Outcome
from autotune.trial.record import TrialRecord

COLUMNS = (
    Column(title="Configuration"),
    Column(title="Outcome"),
    Column(title="Tokens/s", kind="num"),
    Column(title="\N{PLUS-MINUS SIGN}", kind="num"),
    Column(title="Why not the answer", kind="long"),
    Column(title="Step", kind="num"),
    Column(title="Predicted tokens/s", kind="num"),
    Column(title="Reserved", kind="num"),
    Column(title="Allocated", kind="num"),
    Column(title="Predicted memory", kind="num"),
    Column(title="90% interval", kind="num"),
    Column(title="Chance to fit", kind="num"),
    Column(title="Launch", kind="num"),
)
REFUSED = "refused"
"""Outcome of a plan that was never launched."""
_SPEED_COLUMN = 2


def trials_table(study: Study, answer: Answer) -> Table:
    """Return the table, fastest first, then what failed, then what was refused."""
    reasons = Reasons.of(study, answer)
    rows = [_row(record, answer, reasons) for record in _fastest_first(study.records)]
    rows += [_refused_row(entry) for entry in study.rejected]
    return Table(
        key="trials",
        title="All configurations",
        columns=COLUMNS,
        rows=rows,
        facets=("Outcome", "Strategy"),
        example="zero2 mbs=4",
        sorted_by=_SPEED_COLUMN,
    )


def _fastest_first(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    return sorted(
        records, key=lambda r: (r.outcome is Outcome.OK, r.tokens_per_s or 0), reverse=True
    )


def _row(record: TrialRecord, answer: Answer, reasons: Reasons) -> Row:
    composed = words.is_composed(record)
    half = relative_half_width(record)
    outcome = words.OUTCOME_WORDS[record.outcome]
    name = words.plan_name(record.plan)
    reason = reasons.why_not(record)
    winner = answer.winner
    is_winner = winner is not None and (record.plan_id, record.launch) == (
        winner.plan_id,
        winner.launch,
    )
    return Row(
        cells=(
            Cell(text=name, sort=name),
            Cell(text=outcome, sort=outcome),
            Cell(text=words.rate(record.tokens_per_s, composed), sort=record.tokens_per_s),
            Cell(text=words.NOT_MEASURED if half is None else words.percent(half), sort=half),
            Cell(text=reason, sort=reason),
            Cell(text=words.seconds(record.step_s, composed), sort=record.step_s),
            Cell(
                text=words.rate(record.predicted_tokens_per_s),
                sort=record.predicted_tokens_per_s,
            ),
            Cell(text=words.size(record.peak_reserved_bytes), sort=record.peak_reserved_bytes),
            Cell(text=words.size(record.peak_allocated_bytes), sort=record.peak_allocated_bytes),
            Cell(text=words.size(record.predicted_bytes), sort=record.predicted_bytes),
            Cell(text=words.predicted_interval(record), sort=record.predicted_high_bytes),
            Cell(
                text=words.predicted_verdict(record),
                sort=record.predicted_fit_probability,
            ),
            Cell(text=str(record.launch), sort=record.launch),
        ),
        facets=(outcome, _strategy(record.plan)),
        mark="winner" if is_winner else "" if record.outcome is Outcome.OK else "failed",
        tag="answer" if is_winner else "",
    )


def _refused_row(entry: dict[str, Any]) -> Row:
    plan = entry.get("plan")
    name = words.plan_name(plan) if isinstance(plan, dict) else words.clean(plan)
    reason = why_refused(entry)
    nothing = Cell(text=words.NOT_MEASURED)
    return Row(
        cells=(
            Cell(text=name, sort=name),
            Cell(text=REFUSED, sort=REFUSED),
            nothing,
            nothing,
            Cell(text=reason, sort=reason),
            *[nothing] * (len(COLUMNS) - 5),
        ),
        facets=(REFUSED, _strategy(plan if isinstance(plan, dict) else {})),
        mark="failed",
    )


def _strategy(plan: dict[str, Any]) -> str:
    return words.clean(plan.get("strategy", "unknown"))
