"""`trials.csv`: one row a trial, failures included."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from autotune.plan import Plan
from autotune.report.files import write_whole
from autotune.report.study import Study
from autotune.trial.record import TrialRecord

CSV_MARK = "launch,plan_id,outcome,message,plan_"
"""How its header begins."""
_PLAN_KEYS = tuple(field.name for field in fields(Plan))


def write_csv(study: Study, path: Path) -> None:
    """Write every record, in the order of `TrialRecord`'s fields.

    `plan` becomes one `plan_<key>` column a key, where it stands in the record; the list columns
    `measured_accum_steps` and `step_times_s` are joined with ``;``. What was not measured is an
    empty cell. Floats are written in the shortest form that reads back exactly (before pandas 3
    with ``float_precision="round_trip"``). The file appears whole or not at all.
    """
    plan_keys = _plan_keys(study.records)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns(plan_keys))
    writer.writerows(_row(record, plan_keys) for record in study.records)
    write_whole(path, text.getvalue())


def columns(plan_keys: Sequence[str] = _PLAN_KEYS) -> list[str]:
    """Return the header."""
    names: list[str] = []
    for field in fields(TrialRecord):
        if field.name == "plan":
            names += [f"plan_{key}" for key in plan_keys]
        else:
            names.append(field.name)
    return names


def _plan_keys(records: Iterable[TrialRecord]) -> tuple[str, ...]:
    """Return this version's plan fields, then those another version of autotune recorded."""
    foreign = {key for record in records for key in record.plan} - set(_PLAN_KEYS)
    return (*_PLAN_KEYS, *sorted(foreign))


def _row(record: TrialRecord, plan_keys: Sequence[str]) -> list[Any]:
    cells: list[Any] = []
    for field in fields(TrialRecord):
        value = getattr(record, field.name)
        if field.name == "plan":
            cells += [value.get(key) for key in plan_keys]
        elif isinstance(value, tuple):
            cells.append(";".join(repr(item) for item in value))
        else:
            cells.append(value)
    return cells
