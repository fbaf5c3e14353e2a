"""What is kept of finished runs on disk."""

from __future__ import annotations

import json
import logging
import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest

from autotune.memory import knowledge
from autotune.memory.fingerprint import machine_fingerprint
from autotune.memory.knowledge import Entry, KnowledgeBase, known_rows, residuals_for
from autotune.memory.residuals import Ruler
from autotune.plan import Engine, Plan
from autotune.spec.hardware import load_hardware

PLAN = Plan(strategy="zero2", engine=Engine.DEEPSPEED, zero_stage=2, dp_shard=2)


@pytest.fixture(autouse=True)
def heard(monkeypatch):
    """The command line, tested in the same process, keeps its words from the root logger."""
    monkeypatch.setattr(logging.getLogger("autotune"), "propagate", True)


def entry(plan_id: str = "a", **values) -> Entry:
    given = {
        "fingerprint": machine_fingerprint("cpu").to_dict(), "ruler": Ruler.CPU,
        "model": "some-model", "plan_id": plan_id, "workload": "w", "engine": "zero2",
        "recompute": "none", "predicted_bytes": 10**9, "real_bytes": 11 * 10**8,
    }  # fmt: skip
    return Entry(**given | values)


def test_what_is_added_is_read_back(tmp_path):
    base = KnowledgeBase(tmp_path / "new" / "folder")
    assert base.entries() == []
    base.add([entry("a"), entry("b", exceeded=True)])
    base.add([entry("c")])
    assert KnowledgeBase(base.path.parent).entries() == [
        entry("a"), entry("b", exceeded=True), entry("c"),
    ]  # fmt: skip


def test_a_run_counts_once_as_last_measured(tmp_path):
    base = KnowledgeBase(tmp_path)
    base.add([entry("a"), entry("b"), entry("a", real_bytes=5)])
    assert [(e.plan_id, e.real_bytes) for e in base.entries()] == [("b", 11 * 10**8), ("a", 5)]
    base.add([entry("a", workload="another")])
    assert len(base.entries()) == 3


def test_the_size_is_bounded_and_the_oldest_go(tmp_path, monkeypatch):
    monkeypatch.setattr(knowledge, "MOST_ENTRIES", 5)
    base = KnowledgeBase(tmp_path)
    for number in range(9):
        base.add([entry(str(number))])
    assert [e.plan_id for e in base.entries()] == ["4", "5", "6", "7", "8"]
    assert base.path.read_bytes().count(b"\n") == 5


def test_a_damaged_file_is_set_aside_and_named(tmp_path, caplog):
    base = KnowledgeBase(tmp_path)
    base.add([entry("a"), entry("b")])
    whole = base.path.read_bytes()
    damaged = whole.replace(b'"predicted_bytes":1', b'"predicted_bytes":-1', 1) + b"\xff{nonsense\n"
    base.path.write_bytes(damaged)
    assert [e.plan_id for e in base.entries()] == ["b"]
    (aside,) = tmp_path.glob("*.damaged-*")
    assert aside.read_bytes() == damaged
    assert str(aside) in caplog.text and "2 damaged" in caplog.text
    caplog.clear()
    assert [e.plan_id for e in base.entries()] == ["b"] and not caplog.text
    base.path.write_bytes(b"[]\n")
    base.add([entry("c")])
    assert [e.plan_id for e in base.entries()] == ["c"]
    assert len(list(tmp_path.glob("*.damaged-*"))) == 2


def test_a_file_that_never_was_one_is_set_aside(tmp_path, caplog):
    base = KnowledgeBase(tmp_path)
    base.path.write_bytes(b"some notes without a last newline")
    assert base.entries() == []
    (aside,) = tmp_path.glob("*.damaged-*")
    assert aside.read_bytes() == b"some notes without a last newline"
    assert str(aside) in caplog.text


def test_a_last_line_without_its_newline_is_kept(tmp_path, caplog):
    base = KnowledgeBase(tmp_path)
    base.add([entry("a"), entry("b")])
    base.path.write_bytes(base.path.read_bytes().rstrip(b"\n"))
    assert [e.plan_id for e in base.entries()] == ["a", "b"]
    base.add([entry("c")])
    assert [e.plan_id for e in base.entries()] == ["a", "b", "c"]
    assert not caplog.text


def test_a_prediction_reads_the_newest_rows_of_its_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(knowledge, "MOST_ROWS", 2)
    base, machine = KnowledgeBase(tmp_path), machine_fingerprint("cpu")
    base.add([entry(str(n), real_bytes=10**9 + n) for n in range(5)])
    rows = known_rows(base, machine, Ruler.CPU)
    assert rows == [entry("x", real_bytes=10**9 + n).row() for n in (3, 4)]


def test_half_a_line_of_a_killed_search_costs_that_line_alone(tmp_path, caplog):
    base = KnowledgeBase(tmp_path)
    base.add([entry("a"), entry("b")])
    base.path.write_bytes(base.path.read_bytes()[:-30])
    assert [e.plan_id for e in base.entries()] == ["a"]
    base.add([entry("c")])
    assert [e.plan_id for e in base.entries()] == ["a", "c"]
    assert not caplog.text and not list(tmp_path.glob("*.damaged-*"))


def test_lines_of_a_newer_version_are_read(tmp_path):
    base = KnowledgeBase(tmp_path)
    base.path.write_text(json.dumps(entry().model_dump(mode="json") | {"more": 1}) + "\n")
    assert base.entries() == [entry()]


def newer_line(**more) -> bytes:
    """Of a layout that renamed what this version needs."""
    line = {"layout": knowledge.LAYOUT + 1, "ruler": "other", "bytes": {"real": 1}} | more
    return json.dumps(line).encode()


def test_lines_of_a_newer_layout_are_left_as_they_are(tmp_path, caplog):
    base = KnowledgeBase(tmp_path)
    base.add([entry("a")])
    with base.path.open("ab") as file:
        file.write(newer_line() + b"\n")
    assert [e.plan_id for e in base.entries()] == ["a"]
    base.add([entry("b")])
    assert [e.plan_id for e in base.entries()] == ["a", "b"]
    assert not caplog.text and not list(tmp_path.glob("*.damaged-*"))
    assert newer_line() in base.path.read_bytes()


def test_lines_of_a_newer_layout_outlive_a_repair_and_a_trim(tmp_path, monkeypatch, caplog):
    base = KnowledgeBase(tmp_path)
    base.add([entry("a")])
    with base.path.open("ab") as file:
        file.write(newer_line() + b"\n{nonsense}\n")
    assert [e.plan_id for e in base.entries()] == ["a"]
    assert "1 damaged line(s)" in caplog.text and "the 2 readable" in caplog.text
    monkeypatch.setattr(knowledge, "MOST_ENTRIES", 3)
    base.add([entry("b"), entry("c")])
    assert newer_line() not in base.path.read_bytes()  # the limit is for all lines
    assert [e.plan_id for e in base.entries()] == ["a", "b", "c"]


@pytest.mark.parametrize("layout", [0, -1, "2", None, knowledge.LAYOUT, 1.5, True])
def test_what_only_looks_like_a_newer_layout_is_damage(tmp_path, layout, caplog):
    base = KnowledgeBase(tmp_path)
    base.path.write_bytes(newer_line(layout=layout) + b"\n")
    assert base.entries() == []
    assert "1 damaged line(s)" in caplog.text


def add_many(folder: Path, name: str) -> None:
    for number in range(40):
        KnowledgeBase(folder).add([entry(f"{name}-{number}")])


def test_searches_at_the_same_time_lose_nothing(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=add_many, args=(tmp_path, name)) for name in "xyz"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    found = {e.plan_id for e in KnowledgeBase(tmp_path).entries()}
    assert found == {f"{name}-{number}" for name in "xyz" for number in range(40)}


def test_what_cannot_be_written_is_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    base = KnowledgeBase(tmp_path / "file")
    base.add([entry()])
    assert "could not be kept" in caplog.text and str(base.path) in caplog.text
    assert base.entries() == []


@pytest.mark.parametrize(
    ("changed", "count"),
    [
        ({}, 1),
        ({"driver": "another"}, 0),
        ({"num_gpus": 99}, 0),
        ({"libraries": "torch 1.0"}, 0),
        ({"estimator": "older"}, 0),
    ],
)
def test_only_rows_of_the_same_hardware_and_software_count(tmp_path, changed, count):
    base = KnowledgeBase(tmp_path)
    machine = machine_fingerprint("cpu")
    base.add([entry(fingerprint=replace(machine, **changed).to_dict())])
    assert len(known_rows(base, machine, Ruler.CPU)) == count
    assert known_rows(base, machine, Ruler.CUDA) == []


def test_predictions_for_this_machine_alone_use_it(tmp_path, monkeypatch):
    monkeypatch.setenv(knowledge.VARIABLE, str(tmp_path))
    KnowledgeBase(tmp_path).add([entry(str(number)) for number in range(8)])
    here = residuals_for(load_hardware("cpu", 2)).predict(PLAN, "some-model", 10**9)
    assert here.bias == pytest.approx(0.0953, abs=0.02)
    assert here.count >= 8 and here.source == "trials on this machine"
    there = residuals_for(load_hardware("h100-sxm", 2)).predict(PLAN, "some-model", 10**9)
    assert there.bias == 0 and there.source.startswith("assumed")
    monkeypatch.setenv(knowledge.VARIABLE, "off")
    off = residuals_for(load_hardware("cpu", 2)).predict(PLAN, "some-model", 10**9)
    assert off.source != here.source and off.bias != here.bias


def test_where_it_lies(monkeypatch, tmp_path):
    monkeypatch.delenv(knowledge.VARIABLE)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    found = KnowledgeBase.of_user()
    assert found is not None and found.path == tmp_path / "autotune" / "memory.jsonl"
    monkeypatch.setenv(knowledge.VARIABLE, "off")
    assert KnowledgeBase.of_user() is None
