"""What the page says, worked out before the template: sections, tables, cells."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from autotune.report import words
from autotune.report.answer import Answer, advise, explain, standings
from autotune.report.contract import Facts, contract
from autotune.report.reasons import readable_sizes
from autotune.report.study import Study
from autotune.report.table import Table
from autotune.report.trials_table import trials_table
from autotune.trial.protocol import Outcome
from autotune.trial.record import TrialRecord
from autotune.units import format_duration, short_count

_MAX_RIVALS = 5
MAX_LISTED = 200
"""Entries of a list that is not a table: a page with thousands would be slow to open."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """A trial that did not run to the end."""

    name: str
    outcome: str
    reason: str
    """Its first line."""
    details: str
    """The whole message when that has more than the first line."""
    launch: int
    log_dir: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejection:
    """Plans refused for one reason."""

    code: str
    reason: str
    plans: tuple[str, ...]
    """Names of the first `MAX_LISTED`."""
    num_plans: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Headline:
    """The winner's figures, as text."""

    name: str
    tokens_per_s: str
    tokens_range: str
    step: str
    memory: str
    memory_of_limit: str
    memory_share: float | None
    """Of the limit, 0 to 1; None without a limit."""
    is_composed: bool
    settings: Facts


@dataclass(frozen=True, kw_only=True, slots=True)
class RivalRow:
    """One of the next best."""

    name: str
    tokens_per_s: str
    memory: str
    difference: str
    verdict: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """Everything the template prints."""

    title: str
    subtitle: str
    is_final: bool
    headline: Headline | None
    why: Sequence[str]
    advice: Sequence[str]
    rivals: Sequence[RivalRow]
    trials: Table
    num_records: int
    any_composed: bool
    composed_note: str
    failures: Sequence[Failure]
    """The first `MAX_LISTED`; the table has the others with the first line of their reason."""
    num_failures: int
    rejections: Sequence[Rejection]
    num_rejected: int
    contract: Sequence[tuple[str, Facts]]
    command: str
    best_yml: str | None
    notes: Sequence[str]


def build_page(study: Study, answer: Answer) -> Page:
    """Work out the page."""
    failed = [r for r in study.records if r.outcome is not Outcome.OK]
    return Page(
        title=words.clean(study.model_name),
        subtitle=_subtitle(study),
        is_final=answer.is_final,
        headline=_headline(answer.winner, study) if answer.winner else None,
        why=explain(answer),
        advice=advise(study) if answer.winner is None else (),
        rivals=[
            RivalRow(
                name=words.plan_name(rival.record.plan),
                tokens_per_s=words.rate(rival.record.tokens_per_s, words.is_composed(rival.record)),
                memory=words.size(words.memory_bytes(rival.record)),
                difference=("\N{MINUS SIGN}" if rival.lead > 0 else "+")
                + words.percent(1 - 1 / (1 + rival.lead)),
                verdict="tie" if rival.is_tie else "slower" if rival.lead > 0 else "faster",
            )
            for rival in answer.rivals[:_MAX_RIVALS]
        ],
        trials=trials_table(study, answer),
        num_records=len(study.records),
        any_composed=any(words.is_composed(record) for record in study.records),
        composed_note=words.COMPOSED_NOTE,
        failures=[_failure(r) for r in failed[:MAX_LISTED]],
        num_failures=len(failed),
        rejections=_rejections(study),
        num_rejected=len(study.rejected),
        contract=contract(study),
        command=words.clean(study.contract.get("command") or ""),
        best_yml=study.best_yml,
        notes=[words.clean(note) for note in study.notes],
    )


def _subtitle(study: Study) -> str:
    hardware, model = study.section("hardware"), study.section("model")
    parts = []
    if model.get("num_parameters"):
        parts.append(f"{short_count(int(model['num_parameters']))} parameters")
    if hardware.get("num_gpus"):
        device = hardware.get("gpu") or hardware.get("device") or "devices"
        parts.append(f"{hardware['num_gpus']} \N{MULTIPLICATION SIGN} {device}")
    ran = len(standings(study.records))
    parts.append(f"{ran} configuration{'s' * (ran != 1)} measured")
    if study.summary.get("elapsed_s"):
        parts.append(f"in {format_duration(float(study.summary['elapsed_s']))}")
    return words.clean(", ".join(parts))


def _headline(record: TrialRecord, study: Study) -> Headline:
    composed = words.is_composed(record)
    memory, limit = words.memory_bytes(record), study.memory_limit_bytes
    share = memory / limit if memory is not None and limit else None
    kind = "reserved" if record.peak_reserved_bytes is not None else "allocated"
    of_limit = f"{kind}, no limit known"
    if share is not None:
        of_limit = f"{kind}, {words.percent(share)} of {words.size(limit)} a rank"
    return Headline(
        name=words.plan_name(record.plan),
        tokens_per_s=words.rate(record.tokens_per_s, composed),
        tokens_range=_tokens_range(record),
        step=words.seconds(record.step_s, composed),
        memory=words.size(memory),
        memory_of_limit=of_limit,
        memory_share=share,
        is_composed=composed,
        settings=[(key, words.clean(value)) for key, value in record.plan.items()],
    )


def _tokens_range(record: TrialRecord) -> str:
    """Return the 95% interval of tokens/s: tokens of a step over the step's own interval."""
    if not record.tokens_per_s or not record.step_s:
        return ""
    if not record.step_s_low or not record.step_s_high:
        return "interval not measured"
    tokens = record.tokens_per_s * record.step_s
    low, high = tokens / record.step_s_high, tokens / record.step_s_low
    return f"{words.rate(low)} to {words.rate(high)} (95%)"


def _failure(record: TrialRecord) -> Failure:
    message = words.clean(record.message).strip()
    reason = words.first_line(message, 400)
    return Failure(
        name=words.plan_name(record.plan),
        outcome=words.OUTCOME_WORDS[record.outcome],
        reason=readable_sizes(reason) or "no reason was recorded",
        details="" if reason == message else message,
        launch=record.launch,
        log_dir=words.clean(record.log_dir),
    )


def _rejections(study: Study) -> list[Rejection]:
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for entry in study.rejected:
        key = (words.clean(entry.get("code", "")), words.clean(entry.get("reason", "")))
        plan: Any = entry.get("plan")
        groups[key].append(words.plan_name(plan) if isinstance(plan, dict) else words.clean(plan))
    return [
        Rejection(code=code, reason=reason, plans=tuple(plans[:MAX_LISTED]), num_plans=len(plans))
        for (code, reason), plans in sorted(groups.items())
    ]
