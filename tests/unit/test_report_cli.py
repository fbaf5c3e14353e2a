"""`autotune report DIR`."""

from __future__ import annotations

import argparse
import json
import sys
import webbrowser

import pytest

from autotune.cli import report
from autotune.errors import AutotuneError
from tests.unit.report_studies import typical_records, write_study


def run_report(*argv):
    """Run the verb as the command line does."""
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    return report.run(parser.parse_args([str(word) for word in argv]))


def test_writes_both_files_into_the_study(tmp_path, capsys):
    folder = write_study(tmp_path / "study")
    assert run_report(folder) == 0
    assert (folder / "trials.csv").stat().st_size > 0
    assert "</html>" in (folder / "report.html").read_text()
    captured = capsys.readouterr()
    assert "Best: zero2 mbs=4 x ga=8" in captured.out
    assert f"Wrote {folder}/trials.csv and {folder}/report.html" in captured.err


def test_paths_and_json(tmp_path, capsys):
    records = typical_records()
    folder = write_study(tmp_path / "study", records)
    assert (
        run_report(folder, "--csv", tmp_path / "a.csv", "--html", tmp_path / "b.html", "--json")
        == 0
    )
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
    assert run_report(folder, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["best"]["plan_id"] == records[-1].plan_id
    assert document["best"]["measured"]["tokens_per_s"] == records[-1].tokens_per_s


def test_unwritable_path_is_one_message(tmp_path):
    folder = write_study(tmp_path / "study")
    with pytest.raises(AutotuneError, match=r"no/such/x\.csv cannot be written: no folder"):
        run_report(folder, "--csv", tmp_path / "no/such/x.csv")


def test_not_a_study(tmp_path):
    with pytest.raises(AutotuneError, match="is not a study folder"):
        run_report(tmp_path)


def test_a_folder_where_a_file_is_wanted_and_one_path_for_both(tmp_path):
    folder = write_study(tmp_path / "study")
    with pytest.raises(AutotuneError, match=r"--html .* is a folder"):
        run_report(folder, "--html", tmp_path)
    with pytest.raises(AutotuneError, match="Give two names"):
        run_report(folder, "--html", tmp_path / "x", "--csv", tmp_path / "x")
    assert not (tmp_path / "x").exists()
    with pytest.raises(AutotuneError, match=r"both be .*/report\.html"):
        run_report(folder, "--csv", folder / "report.html")
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize("name", ["trials.jsonl", "study.json", "best.yml"])
@pytest.mark.parametrize("second", [False, True])
def test_what_the_search_wrote_is_never_written_over(tmp_path, name, second):
    folder = write_study(tmp_path / "study")
    other = write_study(tmp_path / "other")
    target = (other if second else folder) / name
    before = target.read_bytes()
    more = [other] if second else []
    with pytest.raises(AutotuneError, match="is a file of the study itself"):
        run_report(folder, *more, "--csv", target)
    assert target.read_bytes() == before


def test_opens_the_page_with_the_browser_of_the_environment(tmp_path, capfd, monkeypatch):
    folder = write_study(tmp_path / "my study")
    browser = tmp_path / "browser"
    browser.write_text('#!/bin/sh\necho "$1" > "$(dirname "$0")/opened"\n')
    browser.chmod(0o755)
    monkeypatch.setattr(webbrowser, "_tryorder", None)
    monkeypatch.setattr(webbrowser, "_browsers", {})
    monkeypatch.setenv("BROWSER", str(browser))
    assert run_report(folder, "--open") == 0
    address = (folder / "report.html").resolve().as_uri()
    assert (tmp_path / "opened").read_text().strip() == address and "my%20study" in address
    assert f"Opened {address}" in capfd.readouterr().err


def test_without_a_display_or_a_browser_it_says_how_to_look(tmp_path, capsys, monkeypatch):
    folder = write_study(tmp_path / "study")
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(webbrowser, "open", lambda _: pytest.fail("tried to open a browser"))
    assert run_report(folder, "--open") == 0
    assert "No display here to open a browser on. Copy" in capsys.readouterr().err
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(webbrowser, "open", lambda _: False)
    assert run_report(folder, "--open") == 0
    assert "No browser could be started. Open file://" in capsys.readouterr().err
