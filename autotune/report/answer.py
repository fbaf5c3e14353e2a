"""The study's answer: the winner, by how much it won, what ties with it."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

from autotune.report import words
from autotune.report.started import versus_start
from autotune.report.study import Study
from autotune.trial.protocol import Outcome
from autotune.trial.record import TrialRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class Rival:
    """Another configuration, compared with the winner."""

    record: TrialRecord
    lead: float
    """How much faster the winner is: ``winner / rival - 1`` of tokens/s; negative when slower."""
    noise: float | None
    """Difference that the measurement cannot tell from none, relative; None when not measured."""

    @property
    def is_tie(self) -> bool:
        """Tell whether the difference lies within the noise."""
        return self.noise is not None and abs(self.lead) <= self.noise


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What to tell the user first."""

    winner: TrialRecord | None
    rivals: tuple[Rival, ...]
    """Every other configuration that ran, fastest first."""
    launch_spread: float | None
    """Largest relative difference between two launches of one plan; None when none ran twice."""
    is_final: bool
    """False while the search runs, and when it was stopped before one of its own rules did."""
    remarks: tuple[str, ...] = ()
    confirmed: bool = False
    """Whether the winner's figures are those of launches of its own, which its rivals' are not."""
    start: str = ""
    """What the configuration that the search started from reached; empty where it had none."""

    @property
    def ties(self) -> tuple[Rival, ...]:
        """Those the measurement cannot tell from the winner."""
        return tuple(rival for rival in self.rivals if rival.is_tie)


def find_answer(study: Study) -> Answer:
    """Work out the answer: the search's own choice, else the fastest record."""
    standing = standings(study.records)
    winner, remarks = _winner(study, standing) if study.summary_is_current else (None, ())
    if winner is None:
        winner = next(iter(standing), None)
    spread = launch_spread(study.records)
    rivals: tuple[Rival, ...] = ()
    if winner is not None:
        rivals = tuple(
            _rival(winner, record, spread)
            for record in standing
            if record.plan_id != winner.plan_id
        )
    return Answer(
        winner=winner,
        rivals=rivals,
        confirmed=bool(_confirmation(study)),
        start="" if winner is None else versus_start(study, standing, winner),
        launch_spread=spread,
        is_final=study.has_ended and study.summary_is_current,
        remarks=remarks,
    )


def standings(records: Iterable[TrialRecord]) -> list[TrialRecord]:
    """Return one record a plan that ran to the end, fastest first.

    A plan measured again (a finalist confirmed in a fresh process) stands by its last record, so
    that one which failed its confirmation is out. An interrupted one says nothing of the plan.
    """
    last = {
        record.plan_id: record for record in records if record.outcome is not Outcome.INTERRUPTED
    }
    ran = [
        record
        for record in last.values()
        if record.outcome is Outcome.OK and record.tokens_per_s is not None
    ]
    return sorted(ran, key=_speed, reverse=True)


def pareto_front(records: Iterable[TrialRecord]) -> list[TrialRecord]:
    """Return those no other one beats in both tokens/s and memory, smallest memory first."""
    measured = [r for r in records if r.tokens_per_s and words.memory_bytes(r) is not None]
    measured.sort(key=lambda record: (words.memory_bytes(record) or 0, -_speed(record)))
    front: list[TrialRecord] = []
    for record in measured:
        if not front or _speed(record) > _speed(front[-1]):
            front.append(record)
    return front


def relative_half_width(record: TrialRecord) -> float | None:
    """Half the 95% interval of the step time over the step time."""
    if not record.step_s or record.step_s_low is None or record.step_s_high is None:
        return None
    return (record.step_s_high - record.step_s_low) / 2 / record.step_s


def launch_spread(records: Iterable[TrialRecord]) -> float | None:
    """Return the largest ``(max - min) / mean`` of tokens/s over the launches of one plan.

    The interval of one launch does not hold this: two launches of one plan differ by more than
    the steps inside either. Composed and measured steps are not compared with each other.
    """
    groups: dict[tuple[str, bool], list[float]] = defaultdict(list)
    for record in records:
        if record.outcome is Outcome.OK and record.tokens_per_s is not None:
            groups[record.plan_id, words.is_composed(record)].append(record.tokens_per_s)
    spreads = [
        (max(values) - min(values)) * len(values) / sum(values)
        for values in groups.values()
        if len(values) > 1 and sum(values) > 0
    ]
    return max(spreads, default=None)


def explain(answer: Answer) -> list[str]:
    """Say why the winner won, a sentence a string."""
    if answer.winner is None:
        return []
    start = [answer.start] if answer.start else []
    if not answer.rivals:
        alone = "No other configuration ran to the end, so there is nothing to compare it with."
        return [alone, *start]
    if answer.confirmed:  # a ladder's figure is not to be held against a confirmed one
        return [*answer.remarks, *start]
    sentences = [_versus(answer.rivals[0]), *_tie_sentence(answer)]
    if answer.launch_spread is not None:
        sentences.append(
            "Plans measured in more than one launch differed by up to "
            f"{words.percent(answer.launch_spread)} between launches; the noise above holds that."
        )
    elif not answer.remarks:
        sentences.append(
            "No plan was measured in two launches: the noise is that of the steps inside a launch, "
            "and two launches of one plan can differ by more."
        )
    return [*sentences, *answer.remarks, *start]


def advise(study: Study) -> list[str]:
    """Say what to do when nothing ran to the end, the commonest failure first."""
    counts = Counter(record.outcome for record in study.records)
    counts.pop(Outcome.OK, None)
    if not counts:
        rejected = len(study.rejected)
        if rejected:
            return [
                f"All {rejected} plans were refused before any launch: their codes and reasons "
                "are below."
            ]
        return ["No trial has ended yet: the same search command in the same --out goes on."]
    return [
        f"{count} x {words.OUTCOME_WORDS[outcome]}: {words.OUTCOME_ADVICE[outcome]}"
        for outcome, count in counts.most_common()
    ]


def _winner(
    study: Study, standing: list[TrialRecord]
) -> tuple[TrialRecord | None, tuple[str, ...]]:
    """Return the search's own choice, with the figures it gave in `best.yml`."""
    best = study.summary.get("best")
    if not isinstance(best, dict):
        return None, ()
    plan_id = best.get("plan_id")
    chosen = next((record for record in standing if record.plan_id == plan_id), None)
    if chosen is None:
        return None, (
            f"summary.json names plan {words.clean(plan_id)}, of which no record ran to the end; "
            "the answer is from the records.",
        )
    return _with_measured(chosen, best.get("measured")), _confirmation(study)


def _confirmation(study: Study) -> tuple[str, ...]:
    """Return what the search says of the launches that confirmed its winner."""
    found = study.summary.get("confirmation")
    said = found.get("said") if isinstance(found, dict) else None
    return tuple(words.clean(each) for each in said) if isinstance(said, list) else ()


def _with_measured(record: TrialRecord, measured: Any) -> TrialRecord:
    """Overlay the search's final figures, which may rest on several launches."""
    if not isinstance(measured, dict):
        return record
    figures = {
        field.name
        for field in fields(TrialRecord)
        if field.name.startswith(("tokens_per_s", "step_s", "peak_"))
    }
    kept = {key: measured[key] for key in figures & measured.keys() if measured[key] is not None}
    return replace(record, **kept)


def _rival(winner: TrialRecord, other: TrialRecord, spread: float | None) -> Rival:
    widths = (relative_half_width(winner), relative_half_width(other))
    noise = None
    if widths[0] is not None and widths[1] is not None:
        # Independent launches: the half widths add in squares.
        noise = max(math.hypot(widths[0], widths[1]), spread or 0.0)
    lead = _speed(winner) / _speed(other) - 1 if _speed(other) > 0 else math.inf
    return Rival(record=other, lead=lead, noise=noise)


def _versus(rival: Rival) -> str:
    name = words.plan_name(rival.record.plan)
    figure = words.rate(rival.record.tokens_per_s, words.is_composed(rival.record))
    relation = "faster than the next best" if rival.lead >= 0 else "slower than the fastest"
    sentence = f"{words.percent(rival.lead)} {relation}, {name} ({figure} tokens/s)"
    if rival.noise is None:
        return sentence + "; the noise of the two was not measured."
    if rival.is_tie:
        return sentence + f", which is within the noise of {words.percent(rival.noise)}: a tie."
    times = abs(rival.lead) / rival.noise if rival.noise else math.inf
    beyond = f"{times:.1f} times the noise of {words.percent(rival.noise)}"
    return sentence + f", {beyond if math.isfinite(times) else 'with no measured noise'}."


def _tie_sentence(answer: Answer) -> list[str]:
    if not answer.ties:
        return []
    names = [words.plan_name(rival.record.plan) for rival in answer.ties]
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    sentences = [f"Not told apart from it by this measurement: {shown}."]
    first = answer.ties[0].record
    if answer.winner is not None and answer.ties[0].lead < 0:
        own, others = words.memory_bytes(answer.winner), words.memory_bytes(first)
        if own is not None and others is not None and own < others:
            sentences.append(
                "Of the two, the winner leaves more memory free: it took "
                f"{words.size(own)} a rank, {words.plan_name(first.plan)} {words.size(others)}."
            )
    return sentences


def _speed(record: TrialRecord) -> float:
    return record.tokens_per_s or 0.0
