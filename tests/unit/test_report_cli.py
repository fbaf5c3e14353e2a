"""`autotune report DIR`."""

from __future__ import annotations

import argparse
import json

import pytest

from autotune.cli import report
from autotune.errors import AutotuneError
from tests.unit.report_studies import typical_records, write_study


def _run(*argv):
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    return report.run(parser.parse_args([str(word) for word in argv]))


def test_writes_both_files_into_the_study(tmp_path, capsys):
    folder = write_study(tmp_path / "study")
    assert _run(folder) == 0
    assert (folder / "trials.csv").stat().st_size > 0
    assert "</html>" in (folder / "report.html").read_text()
    captured = capsys.readouterr()
    assert "Best: zero2 mbs=4 x ga=8" in captured.out
    assert f"Wrote {folder}/trials.csv and {folder}/report.html" in captured.err


def test_paths_and_json(tmp_path, capsys):
    records = typical_records()
    folder = write_study(tmp_path / "study", records)
    assert _run(folder, "--csv", tmp_path / "a.csv", "--html", tmp_path / "b.html", "--json") == 0
    assert not (folder / "trials.csv").exists() and not (folder / "report.html").exists()
    document = json.loads(capsys.readouterr().out)
    assert document["study"] == "tiny-qwen3-2gpu"
    assert document["best"]["measured"]["tokens_per_s"] == pytest.approx(32768 / 2.05)
    assert document["stopped_because"].startswith("no remaining")
    assert document["trials"] == [record.to_dict() for record in records]
    assert document["csv"] == str(tmp_path / "a.csv") and (tmp_path / "b.html").is_file()


def test_json_of_a_killed_search_has_the_best_of_its_records(tmp_path, capsys):
    records = typical_records()
    folder = write_study(tmp_path / "study", records, summary={})
    assert _run(folder, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["best"]["plan_id"] == records[-1].plan_id
    assert document["best"]["measured"]["tokens_per_s"] == records[-1].tokens_per_s


def test_unwritable_path_is_one_message(tmp_path):
    folder = write_study(tmp_path / "study")
    with pytest.raises(AutotuneError, match=r"no/such/x\.csv cannot be written: No such file"):
        _run(folder, "--csv", tmp_path / "no/such/x.csv")


def test_not_a_study(tmp_path):
    with pytest.raises(AutotuneError, match="is not a study folder"):
        _run(tmp_path)
