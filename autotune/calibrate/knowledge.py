"""Step times in the knowledge base: what a study measured, for the predictions of the next.

They are columns of the lines that keep memory (`memory.knowledge.Entry`). A line counts for the
same machine and for what made its prediction: the formulas, and the calibration they read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any

import autotune.timing
from autotune.calibrate.residual import TimeRow
from autotune.calibrate.store import speed_marks
from autotune.memory.fingerprint import Fingerprint
from autotune.memory.knowledge import MOST_ROWS, Entry, KnowledgeBase, Trial
from autotune.plan import Plan
from autotune.timing import Calibration


def timer_of(calibration: Calibration | None) -> str:
    """Return a text that is equal for predictions made by the same formulas and measurements."""
    measured = "" if calibration is None else calibration.model_dump_json()
    return hashlib.sha256(f"{_formulas()}{measured}".encode()).hexdigest()[:12]


def time_fields(plan: Plan, predicted_s: float, measured_s: float, timer: str) -> dict[str, Any]:
    """Return the columns of an `Entry` that keep a trial's time.

    Args:
        plan: What ran.
        predicted_s: A step, without any correction.
        measured_s: A step.
        timer: Of `timer_of`.
    """
    return {
        "plan": plan.to_dict(),
        "predicted_step_s": predicted_s,
        "measured_step_s": measured_s,
        "timer": timer,
    }


def known_times(
    base: KnowledgeBase | None,
    machine: Fingerprint,
    timer: str,
    without: Collection[Trial] = (),
) -> list[TimeRow]:
    """Return the trials of earlier studies that count; what cannot be read is left out.

    Trials in `without` are: those of a study that is resumed, which counts them itself.
    """
    if base is None:
        return []
    marks = speed_marks(machine.to_dict())
    rows = [
        row
        for entry in base.entries()
        if entry.timer == timer
        and speed_marks(entry.fingerprint) == marks
        and entry.trial not in without
        for row in _row(entry)
    ]
    return rows[-MOST_ROWS:]


def _row(entry: Entry) -> list[TimeRow]:
    if entry.plan is None or entry.predicted_step_s is None or entry.measured_step_s is None:
        return []
    try:
        plan = Plan.from_dict(entry.plan)
    except (TypeError, ValueError, KeyError):  # of a version whose plans are others
        return []
    return [
        TimeRow(
            plan=plan,
            predicted_s=entry.predicted_step_s,
            measured_s=entry.measured_step_s,
            here=False,
        )
    ]


@cache
def _formulas() -> str:
    folder = Path(autotune.timing.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.py")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()
