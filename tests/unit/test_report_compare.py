"""Two studies side by side."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from autotune.cli import report
from autotune.errors import AutotuneError
from autotune.report.charts.pairs import pairs_chart
from autotune.report.compare import Verdict, compare, sentences, to_document, warning
from autotune.report.compare_console import print_comparison
from autotune.report.compare_page import write_comparison
from autotune.report.differences import Kind
from autotune.report.study import load_study
from tests.unit.report_studies import CONTRACT, make_failure, make_plan, make_record, write_study
from tests.unit.test_report_cli import run_report


def _records(factor=1.0, **changes):
    return [
        make_record(make_plan(name), step_s=factor * step, noise=0.01, **changes)
        for name, step in (("zero1", 2.4), ("zero2", 2.0), ("zero3", 2.9))
    ]


def _compared(tmp_path, first, second, **contract):
    return compare(
        load_study(write_study(tmp_path / "a", first)),
        load_study(write_study(tmp_path / "b", second, contract=contract)),
    )


def test_ratio_is_the_second_over_the_first_against_the_noise_of_both(tmp_path):
    second = [_records()[0], *_records(0.8)[1:2], *_records(1.25)[2:]]
    comparison = _compared(tmp_path, _records(), second)
    by_name = {pair.first.plan["strategy"]: pair for pair in comparison.pairs}
    assert by_name["zero2"].ratio == pytest.approx(1.25)
    assert by_name["zero2"].noise == pytest.approx(0.01 * 2**0.5)
    assert {name: pair.verdict for name, pair in by_name.items()} == {
        "zero1": Verdict.TIE,
        "zero2": Verdict.FASTER,
        "zero3": Verdict.SLOWER,
    }
    assert comparison.differences == () and warning(comparison) == ""


def test_chart_has_the_first_study_across_and_the_second_upwards(tmp_path):
    first, second = _records()[:1], _records(0.8)[:1]
    line, marks = pairs_chart(_compared(tmp_path, first, second)).figure["data"]
    assert (marks["x"], marks["y"]) == ([first[0].tokens_per_s], [second[0].tokens_per_s])
    assert line["x"] == line["y"] == [first[0].tokens_per_s, second[0].tokens_per_s]
    for axis, record in (("error_x", first[0]), ("error_y", second[0])):
        assert marks[axis]["array"] == [pytest.approx(0.01 * record.tokens_per_s)]


def test_verdict_is_the_same_whichever_study_comes_first(tmp_path):
    forth = _compared(tmp_path / "1", _records(), _records(1.0143)).pairs
    back = _compared(tmp_path / "2", _records(1.0143), _records()).pairs
    assert {pair.verdict for pair in forth} == {Verdict.SLOWER}
    assert {pair.verdict for pair in back} == {Verdict.FASTER}


def test_launches_that_scatter_widen_the_noise(tmp_path):
    again = [replace(record, launch=2) for record in _records(1.1)]
    comparison = _compared(tmp_path, [*_records(), *again], _records(1.2))
    assert {pair.verdict for pair in comparison.pairs} == {Verdict.TIE}
    assert comparison.pairs[0].first.launch == 2, "a plan stands by its last record"
    assert not any("inside a launch" in sentence for sentence in sentences(comparison))
    once = _compared(tmp_path / "once", _records(), _records(1.2))
    assert any("inside a launch" in sentence for sentence in sentences(once))


def test_other_work_is_warned_of_loudly_and_other_versions_are_not(tmp_path):
    workload = CONTRACT["workload"] | {"seq_len": 1024}
    versions = CONTRACT["versions"] | {"torch": "2.11.0"}
    comparison = _compared(
        tmp_path, _records(), _records(), workload=workload, versions=versions, strategies=["ddp"]
    )
    assert [(d.kind, d.name, d.first, d.second) for d in comparison.differences][:2] == [
        (Kind.WORK, "workload.seq_len", "512", "1024"),
        (Kind.VERSIONS, "versions.torch", "2.13.0+cpu", "2.11.0"),
    ]
    assert comparison.differences[2].kind is Kind.SEARCH
    assert "workload.seq_len (512 against 1024)" in warning(comparison)
    assert "torch" not in warning(comparison)
    assert (
        sentences(comparison)[0] == "Different: versions (torch); what was searched (strategies)."
    )


def test_model_and_hardware_differences_are_named(tmp_path):
    comparison = _compared(
        tmp_path,
        _records(),
        _records(),
        model=CONTRACT["model"] | {"config": {"hidden_size": 64}},
        hardware=CONTRACT["hardware"] | {"gpu": "H100", "memory_bytes": 80 * 2**30},
    )
    found = {d.name: (d.kind, d.first, d.second) for d in comparison.differences}
    assert found["model.config.hidden_size"] == (Kind.WORK, "not recorded", "64")
    assert found["hardware.gpu"] == (Kind.MACHINE, "cpu", "H100")
    assert found["hardware.memory"] == (Kind.MACHINE, "8.00 GiB", "80.00 GiB")


def test_an_adapter_against_none_is_one_difference(tmp_path):
    workload = CONTRACT["workload"] | {"adapter": {"r": 16, "target_modules": ["q_proj"]}}
    comparison = _compared(tmp_path, _records(), _records(), workload=workload)
    found = [(d.name, d.first, d.second) for d in comparison.differences]
    assert found == [("workload.adapter", "none", "r 16, target_modules q_proj")]


def test_no_limit_against_one_is_one_difference_and_lists_are_words(tmp_path):
    changes = {"memory_limit_bytes": None, "strategies": ["ddp", "zero1"]}
    comparison = _compared(tmp_path, _records(), _records(), **changes)
    assert [(d.name, d.first, d.second) for d in comparison.differences] == [
        ("memory_limit", "700.0 MiB", "none"),
        ("strategies", ", ".join(CONTRACT["strategies"]), "ddp, zero1"),
    ]


def test_same_data_in_another_place_is_no_difference(tmp_path):
    source = {"path": "a.jsonl", "type": "completion", "content": "5f"}
    first = write_study(tmp_path / "a", _records(), contract={"datasets": [source]})
    moved = {"datasets": [source | {"path": "b.jsonl"}]}
    second = write_study(tmp_path / "b", _records(), contract=moved)
    assert compare(load_study(first), load_study(second)).differences == ()
    changed = {"datasets": [source | {"content": "6a"}]}
    third = write_study(tmp_path / "c", _records(), contract=changed)
    assert [d.name for d in compare(load_study(first), load_study(third)).differences] == ["data"]


def test_plans_of_one_study_alone_and_failures_have_no_ratio(tmp_path):
    first = [*_records(), make_failure(make_plan("fsdp2"))]
    second = [*_records()[:2], make_failure(make_plan("zero3")), make_record(make_plan("zero2", 8))]
    comparison = _compared(tmp_path, first, second)
    assert comparison.pairs[-1].verdict is Verdict.ONE_RAN and comparison.pairs[-1].ratio is None
    assert [r.plan["strategy"] for r in comparison.only_first] == ["fsdp2"]
    assert [r.plan["micro_batch_size"] for r in comparison.only_second] == [8]
    document = to_document(comparison)
    assert document["plans"][-1]["outcomes"] == ["ok", "oom"]
    assert [winner["plan_id"] for winner in document["winners"]] == [make_plan("zero2").id] * 2


@pytest.mark.parametrize("width", [60, 200])
def test_console_says_what_differed_and_fits(tmp_path, width):
    workload = CONTRACT["workload"] | {"global_batch_size": 32}
    comparison = _compared(tmp_path, _records(), _records(0.8), workload=workload)
    out = io.StringIO()
    print_comparison(comparison, Console(file=out, width=width))
    flat = " ".join(out.getvalue().split())
    assert "WARNING: The two studies did not measure the same work" in flat
    assert "workload.global_batch_size: 64 against 32" in flat
    assert "Median ratio of tokens/s, second over first: 1.250." in flat
    assert "Both have the same winner: zero2 mbs=4 x ga=8" in flat
    assert all(len(line) <= width for line in out.getvalue().splitlines())


def test_page_holds_the_warning_the_pairs_and_no_script_of_the_study(tmp_path):
    hostile = "</script><script>alert(1)</script>"
    comparison = _compared(tmp_path, _records(), _records(), model={"name": hostile})
    write_comparison(comparison, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "Not the same work" in text and "model.name" in text
    assert "<script>alert" not in text
    assert "16,384" in text


@pytest.mark.parametrize("way", [[], ["--compare"]])
def test_command_writes_both_files_and_prints_json(tmp_path, capsys, way):
    first = write_study(tmp_path / "a", _records())
    second = write_study(tmp_path / "b", _records(0.8))
    assert run_report(first, *way, second, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["studies"] == [str(first), str(second)]
    assert [plan["ratio"] for plan in document["plans"]] == [pytest.approx(1.25)] * 3
    assert document["html"] == str(first / "comparison.html")
    with (first / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["ratio"]) for row in rows] == [pytest.approx(1.25)] * 3
    assert rows[0]["configuration"] == "zero2 mbs=4 x ga=8" and rows[0]["verdict"].startswith("fas")
    assert not (first / "report.html").exists() and not list(second.glob("comparison*"))


def test_two_second_studies_are_one_too_many(tmp_path):
    with pytest.raises(AutotuneError, match="Give one of them"):
        run_report(tmp_path, tmp_path, "--compare", tmp_path)


def test_second_folder_that_is_no_study_is_named(tmp_path):
    first = write_study(tmp_path / "a", _records())
    with pytest.raises(AutotuneError, match=r"nowhere: no such folder"):
        run_report(first, tmp_path / "nowhere")
    assert not (first / "comparison.html").exists()
    assert report.COMPARISON == "comparison"
