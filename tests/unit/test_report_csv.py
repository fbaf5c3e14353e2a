"""The CSV holds every record, and reads back to the same values."""

from __future__ import annotations

from dataclasses import fields, replace

import pandas as pd

from autotune.plan import Plan
from autotune.report.csv import columns, write_csv
from autotune.report.study import load_study
from autotune.trial.protocol import Outcome
from autotune.trial.record import TrialRecord
from tests.unit.report_studies import (
    make_failure,
    make_plan,
    make_record,
    typical_records,
    write_study,
)


def _written(tmp_path, records):
    study = load_study(write_study(tmp_path, records))
    write_csv(study, tmp_path / "trials.csv")
    # pandas 3 reads floats exactly and deprecates being asked to.
    exact = {} if int(pd.__version__.split(".")[0]) >= 3 else {"float_precision": "round_trip"}
    return pd.read_csv(
        tmp_path / "trials.csv",
        **exact,
        keep_default_na=False,
        na_values={
            field.name: [""]
            for field in fields(TrialRecord)
            if "str" not in str(field.type) and "tuple" not in str(field.type)
        },
        dtype={"measured_accum_steps": str, "step_times_s": str, "predicted_verdict": str},
    )


def _record(row):
    """One row back to the record it was."""
    plan = {}
    for field in fields(Plan):
        value = row[f"plan_{field.name}"]
        if value != "" and not pd.isna(value):  # an empty cell: the field's default
            plan[field.name] = value.item() if hasattr(value, "item") else value
    values = {}
    for field in fields(TrialRecord):
        if field.name == "plan":
            continue
        value = row[field.name]
        # A column with an empty cell comes back as floats.
        exact = int if str(field.type).startswith("_Count") else lambda same: same
        values[field.name] = None if pd.isna(value) else exact(value)
    for name, kind in (("measured_accum_steps", int), ("step_times_s", float)):
        values[name] = [kind(part) for part in (values[name] or "").split(";") if part]
    values["predicted_verdict"] = values["predicted_verdict"] or None
    return TrialRecord.from_dict({**values, "plan": plan})


def test_every_value_reads_back_failures_included(tmp_path):
    plan = make_plan("fsdp2", 2)
    records = [
        *typical_records(),
        make_record(plan, step_s=1 / 3, step_times_s=(0.1 + 0.2,), measured_accum_steps=(2,)),
        make_failure(plan, Outcome.INVALID, 'asked, "for";\nfsdp2 \N{EM DASH} ran ddp'),
    ]
    table = _written(tmp_path, records)
    assert len(table) == len(records)
    assert [_record(row) for _, row in table.iterrows()] == records


def test_columns_follow_the_record_with_the_plan_in_its_place(tmp_path):
    table = _written(tmp_path, typical_records())
    names = [field.name for field in fields(TrialRecord)]
    at = names.index("plan")
    plan_names = [f"plan_{field.name}" for field in fields(Plan)]
    assert list(table.columns) == [*names[:at], *plan_names, *names[at + 1 :]]


def test_plan_fields_of_another_version_are_kept(tmp_path):
    record = make_record(make_plan())
    newer = replace(record, plan=record.plan | {"pp": 3})
    table = _written(tmp_path, [record, newer])
    assert table["plan_pp"].tolist() == ["", "3"]


def test_empty_study_has_a_header_alone(tmp_path):
    study = load_study(write_study(tmp_path, []))
    write_csv(study, tmp_path / "trials.csv")
    assert (tmp_path / "trials.csv").read_text() == ",".join(columns()) + "\n"
    assert list(tmp_path.glob(".*tmp")) == []
