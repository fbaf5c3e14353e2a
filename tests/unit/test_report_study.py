"""Reading a study folder, also one a killed search left."""

from __future__ import annotations

import json

import pytest

from autotune.errors import AutotuneError
from autotune.report.study import load_study
from tests.unit.report_studies import make_record, typical_records, write_study


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
