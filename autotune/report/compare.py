"""Two studies side by side: what differed between them, and how fast the same plans ran in each."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from autotune.report import words
from autotune.report.answer import find_answer, launch_spread, relative_half_width
from autotune.report.differences import Difference, Kind, find_differences
from autotune.report.study import Study
from autotune.trial.protocol import Outcome
from autotune.trial.record import TrialRecord

_KIND_NAMES = {
    Kind.MACHINE: "the machine",
    Kind.VERSIONS: "versions",
    Kind.SEARCH: "what was searched",
}


class Verdict(StrEnum):
    """What the comparison of one plan says."""

    FASTER = "faster in the second"
    SLOWER = "slower in the second"
    TIE = "within the noise"
    UNKNOWN = "noise not measured"
    ONE_RAN = "ran in one only"
    NEITHER = "ran in neither"


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """One plan that both studies tried."""

    first: TrialRecord
    second: TrialRecord
    ratio: float | None
    """Tokens/s of the second over the first; None unless both ran to the end."""
    noise: float | None
    """Relative difference the measurements cannot tell from none; None when not measured."""

    @property
    def verdict(self) -> Verdict:
        """Tell which was faster."""
        if self.ratio is None:
            ran = [r.outcome is Outcome.OK for r in (self.first, self.second)]
            return Verdict.ONE_RAN if any(ran) else Verdict.NEITHER
        if self.noise is None:
            return Verdict.UNKNOWN
        # The same base whichever is the faster: by how much the faster one leads.
        lead = max(self.ratio, 1 / self.ratio) - 1
        if lead <= self.noise:
            return Verdict.TIE
        return Verdict.FASTER if self.ratio > 1 else Verdict.SLOWER


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What two studies have in common and what not."""

    first: Study
    second: Study
    differences: tuple[Difference, ...]
    pairs: tuple[Pair, ...]
    """Fastest in the first study first; those without a ratio at the end."""
    only_first: tuple[TrialRecord, ...]
    only_second: tuple[TrialRecord, ...]

    @property
    def unlike_work(self) -> tuple[Difference, ...]:
        """The differences that make the ratios compare unlike things."""
        return tuple(d for d in self.differences if d.kind is Kind.WORK)

    @property
    def ratios(self) -> list[float]:
        """The ratios there are."""
        return [pair.ratio for pair in self.pairs if pair.ratio is not None]

    @property
    def names(self) -> tuple[str, str]:
        """What to call the studies: their folders, as given."""
        return str(self.first.folder.path), str(self.second.folder.path)


def compare(first: Study, second: Study) -> Comparison:
    """Compare two studies plan by plan, each plan by its last record."""
    left, right = _by_plan(first), _by_plan(second)
    spreads = [launch_spread(study.records) or 0.0 for study in (first, second)]
    # Independent measurements: the spreads add in squares, as the half widths do.
    spread = math.hypot(*spreads)
    pairs = [_pair(left[plan_id], right[plan_id], spread) for plan_id in left if plan_id in right]
    pairs.sort(key=lambda pair: (pair.ratio is None, -(pair.first.tokens_per_s or 0.0)))
    return Comparison(
        first=first,
        second=second,
        differences=tuple(find_differences(first, second)),
        pairs=tuple(pairs),
        only_first=tuple(left[plan_id] for plan_id in left if plan_id not in right),
        only_second=tuple(right[plan_id] for plan_id in right if plan_id not in left),
    )


def sentences(comparison: Comparison) -> list[str]:
    """Say what the comparison shows: the plans in common, then the winners."""
    counts = [
        f"Plans tried in both: {len(comparison.pairs):,}, of them {len(comparison.ratios):,} to "
        f"the end in both; only in the first: {len(comparison.only_first):,}, only in the second: "
        f"{len(comparison.only_second):,}."
    ]
    if comparison.ratios:
        verdicts = [pair.verdict for pair in comparison.pairs]
        counts.append(
            f"Median ratio of tokens/s, second over first: "
            f"{statistics.median(comparison.ratios):.3f}. Faster in the second: "
            f"{verdicts.count(Verdict.FASTER)}, slower: {verdicts.count(Verdict.SLOWER)}, within "
            f"the noise: {verdicts.count(Verdict.TIE)}."
        )
        if not any(launch_spread(s.records) for s in (comparison.first, comparison.second)):
            counts.append(
                "No plan was measured in two launches of one study: the noise is that of the steps "
                "inside a launch, and a machine busier in one study than in the other is no part "
                "of it."
            )
    return [*_difference_sentence(comparison), *counts, *_winner_sentences(comparison)]


def warning(comparison: Comparison) -> str:
    """Say loudly that the work was not the same; empty when it was."""
    if not comparison.unlike_work:
        return ""
    what = ", ".join(f"{d.name} ({d.first} against {d.second})" for d in comparison.unlike_work)
    return (
        f"The two studies did not measure the same work: {words.first_line(what, 400)}. The ratios "
        "compare unlike things."
    )


def to_document(comparison: Comparison) -> dict[str, Any]:
    """Return the comparison as JSON values."""
    return {
        "studies": list(comparison.names),
        "warning": warning(comparison),
        "differences": [
            {"kind": str(d.kind), "name": d.name, "first": d.first, "second": d.second}
            for d in comparison.differences
        ],
        "winners": [
            winner and {"plan_id": winner.plan_id, "tokens_per_s": winner.tokens_per_s}
            for winner in (
                find_answer(study).winner for study in (comparison.first, comparison.second)
            )
        ],
        "plans": [
            {
                "plan_id": pair.first.plan_id,
                "plan": pair.first.plan,
                "outcomes": [str(pair.first.outcome), str(pair.second.outcome)],
                "tokens_per_s": [pair.first.tokens_per_s, pair.second.tokens_per_s],
                "ratio": pair.ratio,
                "noise": pair.noise,
                "verdict": str(pair.verdict),
            }
            for pair in comparison.pairs
        ],
        "only_first": [record.plan_id for record in comparison.only_first],
        "only_second": [record.plan_id for record in comparison.only_second],
    }


def _by_plan(study: Study) -> dict[str, TrialRecord]:
    return {r.plan_id: r for r in study.records if r.outcome is not Outcome.INTERRUPTED}


def _pair(first: TrialRecord, second: TrialRecord, spread: float) -> Pair:
    ratio = noise = None
    if first.outcome is second.outcome is Outcome.OK and first.tokens_per_s and second.tokens_per_s:
        ratio = second.tokens_per_s / first.tokens_per_s
        widths = relative_half_width(first), relative_half_width(second)
        if widths[0] is not None and widths[1] is not None:
            noise = max(math.hypot(widths[0], widths[1]), spread)
    return Pair(first=first, second=second, ratio=ratio, noise=noise)


def _difference_sentence(comparison: Comparison) -> list[str]:
    """Name what differed besides the work, of which the warning speaks."""
    told = []
    for kind in (Kind.MACHINE, Kind.VERSIONS, Kind.SEARCH):
        names = [
            d.name.partition(".")[2] or d.name for d in comparison.differences if d.kind is kind
        ]
        if names:
            told.append(f"{_KIND_NAMES[kind]} ({', '.join(names)})")
    return [f"Different: {'; '.join(told)}."] if told else []


def _winner_sentences(comparison: Comparison) -> list[str]:
    winners = [find_answer(s).winner for s in (comparison.first, comparison.second)]
    if winners[0] is None or winners[1] is None:
        absent = " and ".join(
            which for which, won in zip(("first", "second"), winners, strict=True) if won is None
        )
        return [f"No configuration ran to the end in the {absent}."]
    told = [
        f"{words.plan_name(winner.plan)} ({words.rate(winner.tokens_per_s)} tokens/s)"
        for winner in winners
        if winner is not None
    ]
    if winners[0].plan_id == winners[1].plan_id:
        return [f"Both have the same winner: {told[0]} in the first, {told[1]} in the second."]
    result = [f"The winners differ: {told[0]} in the first, {told[1]} in the second."]
    for pair in comparison.pairs:
        for winner, where in zip(winners, ("first", "second"), strict=True):
            if winner is not None and pair.first.plan_id == winner.plan_id and pair.ratio:
                result.append(
                    f"The {where}'s winner gave {words.rate(pair.first.tokens_per_s)} tokens/s in "
                    f"the first and {words.rate(pair.second.tokens_per_s)} in the second: "
                    f"{pair.ratio:.3g} times, {pair.verdict}."
                )
    return result
