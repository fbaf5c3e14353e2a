"""The doctor's all-reduces on real processes, one of them stopped in mid-air."""

from __future__ import annotations

import json
import os
import signal

import pytest

from autotune.cli import main
from autotune.doctor import Level
from autotune.doctor.collectives import (
    Ranks,
    check_collectives,
    collective_findings,
    rounds_of_pairs,
)
from autotune.trial.processes import process_state

pytestmark = pytest.mark.integration


def test_a_stopped_rank_s_pair_is_named_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    with Ranks(3, "cpu", timeout_s=20.0) as ranks:
        assert ranks.all_reduce((0, 1, 2)).seconds is not None
        pids = [ranks.pid(number) for number in range(3)]
        os.kill(pids[2], signal.SIGSTOP)
        ranks._timeout_s = 2.0
        (stuck,) = ranks.all_reduce_side_by_side([(1, 2)])
        assert stuck.hung and stuck.silent == (2,) and stuck.ranks == (1, 2)
        assert process_state(pids[2]) is None and process_state(pids[0]) is not None
        ranks._timeout_s = 20.0
        sums = [ranks.all_reduce(pair) for pairs in rounds_of_pairs(3) for pair in pairs]
        assert all(each.seconds for each in sums), sums
        (found,) = collective_findings([stuck, *sums], "cpu", 2.0)
        assert found.level is Level.BROKEN and "pair 1-2, no answer of rank 2" in found.seen
        pids = [ranks.pid(number) for number in range(3)]
    assert [process_state(pid) for pid in pids] == [None] * 3


@pytest.mark.slow
def test_an_interface_that_is_not_there_fails_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nonesuch0")
    with pytest.raises(SystemExit) as caught:
        main(
            ["doctor", "--device", "cpu", "--gpus", "2", "--measure", "--timeout", "20s", "--json"]
        )
    document = json.loads(capsys.readouterr().out)
    found = {each["check"]: each for each in document["findings"]}
    assert caught.value.code == 1 and found["interfaces"]["level"] == "broken"
    assert "pair 0-1" in found["allreduce"]["seen"] and "GLOO_SOCKET" in found["allreduce"]["do"]
    assert document["calibration"] is None and "hang" in document["not_measured"][0]


def test_ranks_that_cannot_start_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    (found,) = check_collectives(2, "cpu", 5.0)
    assert found.level is Level.BROKEN and "ended with 1" in found.seen
