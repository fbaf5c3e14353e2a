"""The doctor's all-reduces in words, its text and its command."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys

import pytest
from rich.console import Console

from autotune.cli import main
from autotune.cli.doctor import print_findings
from autotune.doctor import Level
from autotune.doctor.collectives import Ranks, Sum, collective_findings, rounds_of_pairs
from autotune.doctor.network import check_variables


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8])
def test_every_pair_once_in_rounds_of_disjoint_ones(count):
    rounds = list(rounds_of_pairs(count))
    pairs = [pair for each in rounds for pair in each]
    assert sorted(pairs) == [(a, b) for a in range(count) for b in range(a + 1, count)]
    assert all(len({rank for pair in each for rank in pair}) == 2 * len(each) for each in rounds)


def test_sums_in_words():
    good = [Sum(ranks=(0, 1), seconds=0.001), Sum(ranks=(0, 2), seconds=0.001)]
    slow = Sum(ranks=(1, 2), seconds=0.1)
    whole = Sum(ranks=(0, 1, 2), seconds=0.002)
    fine = collective_findings([*good, slow, whole], "cuda", 30)
    assert [f.level for f in fine] == [Level.OK, Level.WARNING] and "pair 1-2" in fine[1].seen
    assert [f.level for f in collective_findings([*good, slow, whole], "cpu", 30)] == [Level.OK]
    hung = Sum(ranks=(1, 2), hung=True, silent=(2,))
    (found,) = collective_findings([*good, hung, whole], "cuda", 30)
    assert found.level is Level.BROKEN
    assert "NCCL hung: pair 1-2, no answer of rank 2 within 30 s" in found.seen
    assert "NCCL_P2P_DISABLE=1" in found.do and "NCCL_IB_DISABLE=1" in found.do
    (found,) = collective_findings([Sum(ranks=(0, 1, 2), error="x: y")], "cpu", 30)
    assert "gloo failed: all 3 ranks: x: y" in found.seen


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_text_keeps_to_the_width(width, machine):
    findings = check_variables(machine(NCCL_SOCKET_IFNAME="ib0", RANK="1"), infiniband=False)
    out = io.StringIO()
    print_findings(findings, Console(file=out, width=width))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert lines[-1] == "1 broken, 1 note."
    text = " ".join(out.getvalue().split())
    for finding in findings:
        for words in (finding.check, finding.seen, finding.do):
            assert words in text


def test_the_command_says_it_in_json_and_by_its_exit_code(capsys, monkeypatch):
    def doctor(*words):
        with pytest.raises(SystemExit) as caught:
            main(["doctor", "--device", "cpu", "--no-collectives", "--json", *words])
        return caught.value.code, json.loads(capsys.readouterr().out)["findings"]

    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    code, found = doctor()
    assert code == int(any(each["level"] == "broken" for each in found))
    assert {"shm", "nofile", "host_memory", "versions", "infiniband"} <= {f["check"] for f in found}
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nonesuch0")
    code, found = doctor()
    assert code == 1
    assert any(f["check"] == "interfaces" and "nonesuch0" in f["seen"] for f in found)


@pytest.mark.parametrize(
    "words", [["--timeout", "soon"], ["--nodes", "0"], ["--model", "nonesuch"]]
)
def test_bad_input(words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["doctor", "--device", "cpu", "--no-collectives", *words])
    assert caught.value.code == 2 and "Traceback" not in capsys.readouterr().err


def test_a_rank_that_ended_before_its_order_is_put_away(monkeypatch):
    """What it did not take is still in the pipe's buffer, and closing sends it again."""

    def started(self, numbers):
        for number in numbers:
            self._processes[number] = subprocess.Popen(
                [sys.executable, "-c", "pass"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                text=True, bufsize=1, start_new_session=True,
            )  # fmt: skip

    monkeypatch.setattr(Ranks, "start", started)
    with Ranks(1, "cpu") as ranks:
        process = ranks._processes[0]
        process.wait()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write("an order\n")
    assert process.stdin.closed and process.stdout.closed
