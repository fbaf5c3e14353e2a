"""The configuration a search started from, held against its winner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autotune.report import words
from autotune.report.study import Study
from autotune.trial.protocol import Outcome
from autotune.trial.record import TrialRecord


def versus_start(study: Study, standing: Sequence[TrialRecord], winner: TrialRecord) -> str:
    """Return a sentence on what the configuration of `--from` reached; empty without one.

    Both figures are those of the search's own launches: a confirming launch is another measure.

    Args:
        study: Its contract names the plan.
        standing: One record a plan that ran, as the search measured them.
        winner: The search's choice.
    """
    start = study.contract.get("start")
    if not isinstance(start, dict) or not isinstance(start.get("plan"), dict):
        return ""
    plan_id = start.get("plan_id")
    name = f"The start, {words.plan_name(start['plan'])} of {words.clean(start.get('file'))},"
    if plan_id == winner.plan_id:
        return f"{name} is the winner itself."
    reached = next((r for r in standing if r.plan_id == plan_id), None)
    best = next((r for r in standing if r.plan_id == winner.plan_id), None)
    if reached is None:
        return f"{name} {_why_not(study, plan_id, start['plan'])}"
    rate = words.rate(reached.tokens_per_s, words.is_composed(reached))
    sentence = f"{name} reached {rate} tokens/s"
    if best is None or not best.tokens_per_s or not reached.tokens_per_s:
        return sentence + "."
    lead = best.tokens_per_s / reached.tokens_per_s - 1
    if lead < 0:
        return f"{sentence}, {words.percent(-lead)} more than the winner in the search's launches."
    return f"{sentence}: the winner is {words.percent(lead)} faster."


def _why_not(study: Study, plan_id: Any, plan: dict[str, Any]) -> str:
    failed = [r for r in study.records if r.plan_id == plan_id and r.outcome is not Outcome.OK]
    if failed:
        return f"did not run to its end: {words.OUTCOME_WORDS[failed[-1].outcome]}."
    for refused in study.rejected:
        if refused.get("plan") == plan:
            return f"was not measured: {words.clean(refused.get('reason'))}"
    return "was not measured: the search ended before, seeing little chance that it is faster."
