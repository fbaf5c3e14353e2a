"""What `report` and `capacity` may write over, and what they leave as it is."""

from __future__ import annotations

import os

import pytest

from autotune.cli import main
from autotune.errors import AutotuneError
from autotune.report import compare_page
from autotune.report.csv import CSV_MARK, columns
from autotune.report.files import Target, check_targets, write_whole
from tests.unit.report_studies import write_study

CAPACITY = (
    "capacity", "--model", "qwen3-0.6b", "--gpu-type", "h100", "--gpus", "1", "--tokens", "1B",
    "--strategies", "ddp",
)  # fmt: skip


def run(capsys, *argv):
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in argv])
    return caught.value.code, capsys.readouterr().err


@pytest.fixture
def study(tmp_path):
    return write_study(tmp_path / "study")


@pytest.fixture(params=["report", "report of two", "capacity"])
def verb(request, study, tmp_path):
    if request.param == "capacity":
        return CAPACITY
    second = [write_study(tmp_path / "second")] if "two" in request.param else []
    return ("report", study, *second)


@pytest.mark.parametrize("flag", ["--csv", "--html"])
def test_only_an_older_file_of_its_kind_is_written_over(capsys, tmp_path, verb, flag):
    notes = tmp_path / "notes.txt"
    notes.write_text("my own notes")
    code, err = run(capsys, *verb, flag, notes)
    assert code == 2 and f"{flag} {notes} exists" in err and notes.read_text() == "my own notes"
    notes.write_text("")
    for _ in range(2):  # over an empty file, then over its own
        assert run(capsys, *verb, flag, notes)[0] == 0
    assert notes.stat().st_size > 100
    other = "--csv" if flag == "--html" else "--html"
    before = notes.read_bytes()
    assert run(capsys, *verb, other, notes)[0] == 2 and notes.read_bytes() == before


@pytest.mark.parametrize("flag", ["--csv", "--html"])
@pytest.mark.parametrize("name", ["trials.jsonl", "study.json"])
def test_no_verb_writes_over_a_study(capsys, tmp_path, verb, flag, name):
    target = write_study(tmp_path / "third", []) / name  # no trial yet: that file is empty
    before = target.read_bytes()
    link = tmp_path / "link"
    link.symlink_to(target)
    for path in (target, link):
        code, err = run(capsys, *verb, flag, path)
        assert code == 2 and "is a file of the study itself" in err
    assert target.read_bytes() == before


def test_a_link_stays_and_its_file_is_written(capsys, tmp_path, verb):
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "page.html"
    link.symlink_to("elsewhere/page.html")
    for _ in range(2):
        assert run(capsys, *verb, "--html", link)[0] == 0
        assert link.is_symlink() and (tmp_path / "elsewhere/page.html").stat().st_size > 100
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["page.html"]
    link.unlink()
    link.symlink_to(link)
    assert run(capsys, *verb, "--html", link)[0] == 2


def test_what_is_no_regular_file_is_refused(capsys, tmp_path, verb):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    code, err = run(capsys, *verb, "--html", pipe)
    assert code == 2 and "is no regular file" in err and pipe.is_fifo()


def test_the_file_output_is_redirected_to_is_refused(tmp_path, monkeypatch):
    out = tmp_path / "out.txt"
    out.touch()
    status = out.stat()
    monkeypatch.setattr(os, "fstat", lambda descriptor: status)
    with pytest.raises(AutotuneError, match="is no regular file"):
        check_targets([Target(flag="--html", path=out, mark="autotune report")])


def test_a_default_name_in_the_study_is_its_own_whatever_it_holds(capsys, study):
    (study / "report.html").write_text("of an older version, without a mark")
    assert run(capsys, "report", study)[0] == 0
    assert "</html>" in (study / "report.html").read_text()


def test_the_marks_are_how_the_tables_begin():
    assert ",".join(columns()).startswith(CSV_MARK)
    assert ",".join(compare_page._CSV_COLUMNS).startswith(compare_page.CSV_MARK)


def test_a_write_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / "a", "\ud800")
    assert list(tmp_path.iterdir()) == []
