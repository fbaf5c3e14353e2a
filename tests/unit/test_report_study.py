"""Reading a study folder, also one a killed search left."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from autotune.errors import AutotuneError
from autotune.report.console import print_result
from autotune.report.csv import write_csv
from autotune.report.html import render
from autotune.report.study import load_study
from autotune.trial.store import read_records
from tests.unit.report_studies import (
    ended_summary,
    make_plan,
    make_record,
    typical_records,
    write_study,
)


def test_reads_back_what_the_search_wrote(tmp_path):
    records = typical_records()
    study = load_study(write_study(tmp_path, records))
    assert study.records == tuple(records)
    assert study.name == "tiny-qwen3-2gpu"
    assert study.memory_limit_bytes == 700 * 2**20
    assert study.best_yml is not None and study.best_yml.startswith("# fastest")
    assert study.notes == ()


@pytest.mark.parametrize("cut", [1, 40, 2])
def test_half_written_last_line_is_left_out_and_named(tmp_path, cut):
    records = typical_records()
    folder = write_study(tmp_path, records)
    whole = (folder / "trials.jsonl").read_bytes()
    last = whole.rstrip(b"\n").rindex(b"\n") + 1
    (folder / "trials.jsonl").write_bytes(whole[: last + cut])
    study = load_study(folder)
    assert study.records == tuple(records[:-1])
    assert len(study.notes) == 1
    assert f"line {len(records)}" in study.notes[0]


def test_half_line_in_the_middle_after_a_resume(tmp_path):
    first, second, third = typical_records()[:3]
    lines = [json.dumps(record.to_dict()) for record in (first, second, third)]
    folder = write_study(tmp_path, [])
    text = lines[0] + "\n" + lines[1][:50] + lines[1] + "\n" + lines[2] + "\n"
    (folder / "trials.jsonl").write_text(text)
    study = load_study(folder)
    assert study.records == (first, third)
    assert "line 2" in study.notes[0]


def test_cut_inside_a_character(tmp_path):
    record = make_record(typical_records()[0].plan_object, message="größer")
    folder = write_study(tmp_path, [])
    line = json.dumps(record.to_dict(), ensure_ascii=False).encode()
    (folder / "trials.jsonl").write_bytes(line[: line.index("ö".encode()) + 1])
    study = load_study(folder)
    assert study.records == () and len(study.notes) == 1


def test_whole_json_that_is_no_record_is_left_out(tmp_path):
    folder = write_study(tmp_path, [])
    (folder / "trials.jsonl").write_text('[1, 2]\n7\n{"launch": 1}\n"text"\n')
    study = load_study(folder)
    assert study.records == () and len(study.notes) == 4


def test_nan_is_not_measured(tmp_path):
    record = make_record(typical_records()[0].plan_object, tokens_per_s=float("nan"))
    assert load_study(write_study(tmp_path, [record], summary={})).records[0].tokens_per_s is None


def test_no_records_and_no_summary_yet(tmp_path):
    folder = write_study(tmp_path, [], summary={}, best_yml=None)
    (folder / "trials.jsonl").unlink()
    study = load_study(folder)
    assert study.records == () and study.summary == {} and study.best_yml is None
    assert study.name == tmp_path.name


def test_half_written_summary_is_named(tmp_path):
    folder = write_study(tmp_path)
    (folder / "summary.json").write_text('{"best": {"plan')
    study = load_study(folder)
    assert study.summary == {} and "summary.json" in study.notes[0]


def test_folder_that_is_no_study_says_what_it_holds(tmp_path):
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "logs").mkdir()
    with pytest.raises(AutotuneError, match=r"holds logs/, model\.safetensors.*autotune search"):
        load_study(tmp_path)


def test_missing_folder_file_and_broken_contract(tmp_path):
    with pytest.raises(AutotuneError, match="no such folder"):
        load_study(tmp_path / "nowhere")
    file = tmp_path / "best.yml"
    file.touch()
    with pytest.raises(AutotuneError, match="is a file"):
        load_study(file)
    folder = write_study(tmp_path / "s")
    (folder / "study.json").write_text("{")
    with pytest.raises(AutotuneError, match=r"study\.json cannot be read"):
        load_study(folder)
    (folder / "study.json").write_text("[]")
    with pytest.raises(AutotuneError, match="list"):
        load_study(folder)
    (folder / "study.json").write_text('{"schema_version": 99}')
    with pytest.raises(AutotuneError, match="schema_version 99"):
        load_study(folder)


def _show(folder):
    study = load_study(folder)
    render(study)
    write_csv(study, folder / "trials.csv")
    print_result(study, Console(file=io.StringIO()))
    return study


@pytest.mark.parametrize(
    "change",
    [
        {"tokens_per_s": "16000"}, {"tokens_per_s": 0}, {"tokens_per_s": True}, {"plan": [1]},
        {"started_at": None}, {"step_times_s": [0, 0]}, {"step_times_s": ["1.0"]},
        {"launch": "first"}, {"launch": 10**400}, {"peak_reserved_bytes": "2 GiB"},
        {"peak_allocated_bytes": 10**400}, {"predicted_step_s": 0}, {"message": 7},
        {"plan": make_plan().to_dict() | {"micro_batch_size": "4"}},
        {"plan": make_plan().to_dict() | {"cp": 10**400}},
    ],
)  # fmt: skip
def test_values_no_trial_can_have_written_are_set_aside(tmp_path, change):
    records = typical_records()[:3]
    folder = write_study(tmp_path, records)
    lines = (folder / "trials.jsonl").read_text().splitlines()
    lines[1] = json.dumps(json.loads(lines[1]) | change)
    (folder / "trials.jsonl").write_text("\n".join(lines) + "\n")
    study = _show(folder)
    assert study.records == (records[0], records[2])
    assert len(study.notes) == 1 and "line 2 is not a whole record" in study.notes[0]
    with pytest.raises(AutotuneError, match="line 2 is no record"):  # a search would go on from it
        read_records(folder / "trials.jsonl")


@pytest.mark.parametrize("time", ["9999-12-31T23:59:59+00:00", "0001-01-01T00:00:00+14:00"])
def test_a_time_at_the_end_of_the_calendar_is_shown(tmp_path, time):
    record = make_record(make_plan(), started_at=time)
    assert _show(write_study(tmp_path, [record])).records == (record,)


@pytest.mark.parametrize(
    "change", [{"rejected": [1]}, {"rejected": 1}, {"best": [1]}, {"elapsed_s": "long"}]
)
def test_values_no_search_writes_are_left_out_of_the_summary(tmp_path, change):
    records = typical_records()[:3]
    folder = write_study(tmp_path, records, summary=ended_summary(records) | change)
    study = _show(folder)
    assert next(iter(change)) in study.notes[0] and next(iter(change)) not in study.summary


@pytest.mark.parametrize(
    "change",
    [
        {"memory_limit_bytes": "700 MiB"}, {"memory_limit_bytes": 10**400},
        {"hardware": {"memory_bytes": "8 GiB"}}, {"model": {"num_parameters": "13M"}},
    ],
)  # fmt: skip
def test_a_size_in_the_contract_that_is_none_is_one_message(tmp_path, change):
    with pytest.raises(AutotuneError, match=r"study\.json: .* is no such number"):
        load_study(write_study(tmp_path, contract=change))
