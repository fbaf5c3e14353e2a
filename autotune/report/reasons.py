"""Why a configuration is not the answer: one short sentence each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autotune.report import words
from autotune.report.answer import Answer, Rival
from autotune.report.study import Study
from autotune.trial.protocol import Outcome
from autotune.trial.record import TrialRecord
from autotune.units import format_bytes

_PLAIN_BYTES = re.compile(r"\b(\d{4,}) bytes\b")
_PREDICTED_OOM = "PREDICTED_OOM"


@dataclass(frozen=True, slots=True)
class Reasons:
    """Answers for every record of a study; made once, since each needs the whole of it."""

    answer: Answer
    limit_bytes: int | None
    rivals: Mapping[str, Rival]
    last_launch: Mapping[str, int]
    """Of each plan: the launch whose record the plan stands by."""
    largest_that_ran: Mapping[tuple[Any, ...], list[TrialRecord]]
    """Of each family: what ran, smallest micro batch first."""

    @classmethod
    def of(cls, study: Study, answer: Answer) -> Reasons:
        """Prepare the answers for a study."""
        families: dict[tuple[Any, ...], list[TrialRecord]] = {}
        for record in study.records:
            if record.outcome is Outcome.OK:
                families.setdefault(_family(record), []).append(record)
        for members in families.values():
            members.sort(key=_micro_batch)
        return cls(
            answer=answer,
            limit_bytes=study.memory_limit_bytes,
            rivals={rival.record.plan_id: rival for rival in answer.rivals},
            last_launch={record.plan_id: record.launch for record in study.records},
            largest_that_ran=families,
        )

    def why_not(self, record: TrialRecord) -> str:
        """Say why this record is not the answer; of the answer, that it is."""
        if record.outcome in (Outcome.OOM, Outcome.HOST_OOM):
            return self._out_of_memory(record)
        if record.outcome is not Outcome.OK:
            return readable_sizes(words.first_line(record.message, 200)) or "no reason was recorded"
        if record.launch != self.last_launch[record.plan_id]:
            return f"measured again in launch {self.last_launch[record.plan_id]}"
        winner = self.answer.winner
        if winner is not None and record.plan_id == winner.plan_id:
            return "the answer"
        rival = self.rivals.get(record.plan_id)
        return _compared(rival) if rival else "no speed was measured"

    def _out_of_memory(self, record: TrialRecord) -> str:
        message = readable_sizes(words.first_line(record.message, 200))
        parts = [message or "out of memory"]
        if record.peak_reserved_bytes is not None:
            parts.append(f"had {words.size(record.peak_reserved_bytes)}")
        if self.limit_bytes is not None and record.outcome is Outcome.OOM:
            parts.append(f"limit {words.size(self.limit_bytes)} a rank")
        if record.predicted_bytes is not None:
            parts.append(f"predicted {words.size(record.predicted_bytes)}")
        smaller = [
            other
            for other in self.largest_that_ran.get(_family(record), [])
            if _micro_batch(other) < _micro_batch(record)
        ]
        if smaller and (memory := words.memory_bytes(smaller[-1])) is not None:
            parts.append(f"micro batch {_micro_batch(smaller[-1])} took {words.size(memory)}")
        return "; ".join(parts)


def why_refused(entry: Mapping[str, Any]) -> str:
    """Say why a plan was never launched, from an entry of the summary's `rejected`."""
    code, reason = (words.clean(entry.get(key) or "") for key in ("code", "reason"))
    if code == _PREDICTED_OOM:
        return reason
    return f"refused by rule {code}: {reason}" if code else reason


def readable_sizes(text: str) -> str:
    """Write the plain byte counts of a library's message in units."""
    return _PLAIN_BYTES.sub(lambda found: format_bytes(int(found[1])), text)


def _compared(rival: Rival) -> str:
    # Of the rival's own side: the answer at 100, this one at 68, is 32% slower.
    share = words.percent(1 - 1 / (1 + rival.lead))
    difference = f"{share} {'slower' if rival.lead >= 0 else 'faster'}"
    if rival.noise is None:
        return f"{difference}; its noise was not measured"
    if rival.is_tie:
        return f"a tie: {difference}, within the noise of {words.percent(rival.noise)}"
    if rival.noise:
        difference += f", {abs(rival.lead) / rival.noise:.1f} times the noise"
    return difference if rival.lead >= 0 else f"{difference}; the search chose another"


def _family(record: TrialRecord) -> tuple[Any, ...]:
    """Return what the plans of one ladder have in common."""
    ladder = ("micro_batch_size", "grad_accum_steps")
    return tuple(sorted((k, str(v)) for k, v in record.plan.items() if k not in ladder))


def _micro_batch(record: TrialRecord) -> int:
    size = record.plan.get("micro_batch_size")
    return size if isinstance(size, int) else 0
