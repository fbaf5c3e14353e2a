"""A fork server that dies takes every launch along that it forked, and no other; no torch here."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from autotune.plan import Engine, Plan
from autotune.spec.workload import Workload
from autotune.trial import forkserver
from autotune.trial.conversation import ConversationalLaunch
from autotune.trial.forkserver import ForkServer
from autotune.trial.launch import run_launch
from autotune.trial.protocol import ModelSource, Outcome, Request, Rung, heartbeat_file
from autotune.trial.record import TrialRecord
from autotune.trial.watch import Limits
from tests.unit.small_rank_server import DIES, GO, WAITS, WELL

LIMITS = Limits(deadline_s=60, hang_s=60)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ForkServer]:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -m tests.unit.small_rank_server "$3"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    # pytest says in the environment which test runs.
    with ForkServer(tmp_path, ignored=frozenset({"PYTEST_CURRENT_TEST"})) as made:
        yield made


def request_in(folder: Path, *rungs: Rung) -> Request:
    return Request(
        launch_id=folder.name,
        mode="trial",
        model=ModelSource(name="none", config={}),
        plan=Plan(strategy="ddp", engine=Engine.DDP, dp_replicate=2).to_dict(),
        workload=Workload(seq_len=64, global_batch_size=2),
        device="cpu",
        out_dir=str(folder),
        rungs=list(rungs),
    )


def launch(folder: Path, server: ForkServer) -> ConversationalLaunch:
    return ConversationalLaunch(request_in(folder), folder, LIMITS, starter=server)


def measured(launch: ConversationalLaunch, micro_batch_size: int) -> TrialRecord:
    return launch.measure(rung_of(micro_batch_size))


def rung_of(micro_batch_size: int) -> Rung:
    return Rung(micro_batch_size=micro_batch_size, grad_accum_steps=1)


def until(holds: Callable[[], bool]) -> None:
    ends = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.01)


def test_every_launch_of_a_server_that_dies_is_repeated(server: ForkServer, tmp_path: Path) -> None:
    folders = [tmp_path / "1", tmp_path / "2"]
    with launch(folders[0], server) as one, launch(folders[1], server) as other:
        first, pool = server.pid, ThreadPoolExecutor(2)
        assert first is not None
        asked = [pool.submit(measured, each, WAITS) for each in (one, other)]
        for folder in folders:
            until(lambda folder=folder: all((folder / heartbeat_file(n)).exists() for n in (0, 1)))
        os.kill(first, signal.SIGKILL)
        for folder in folders:
            (folder / GO).touch()
        records = [each.result(60) for each in asked]
        pool.shutdown()
        notes = [each.close().notes for each in (one, other)]
    assert [(record.outcome, record.launch_mode) for record in records] == [
        (Outcome.OK, "fork")
    ] * 2
    assert notes == [["the fork server died with -9; the launch is repeated"]] * 2
    assert server.pid not in (None, first)


def test_so_is_one_that_measures_a_given_ladder(server: ForkServer, tmp_path: Path) -> None:
    folder = tmp_path / "1"
    killed: list[int] = []

    def kill_once() -> None:
        if not killed and (folder / heartbeat_file(0)).exists() and server.pid is not None:
            killed.append(server.pid)
            os.kill(server.pid, signal.SIGKILL)
            (folder / GO).touch()

    request = request_in(folder, rung_of(WELL), rung_of(WAITS))
    ended = run_launch(request, folder, LIMITS, starter=server, on_tick=kill_once)
    assert killed and server.pid not in (None, *killed)
    assert ended.outcome is Outcome.OK, ended.message
    assert [len(result.rungs) for result in ended.results] == [2, 2]
    assert ended.notes == ["the fork server died with -9; the launch is repeated"]


def test_a_death_is_not_held_against_a_later_server(server: ForkServer, tmp_path: Path) -> None:
    """A rank that dies by itself after the fork server's death is a crash, and is not repeated."""
    with launch(tmp_path / "1", server) as one:
        assert measured(one, WELL).outcome is Outcome.OK
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        assert one.close().outcome is not Outcome.OK
    with launch(tmp_path / "2", server) as other:
        crashed = measured(other, DIES)
    assert crashed.outcome is Outcome.CRASHED and "ended with code 3" in crashed.message
    assert other.close().notes == []


def test_a_server_that_does_not_answer_never_forks_what_another_was_asked_for(
    server: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forkserver, "_ANSWER_S", 0.5)
    with launch(tmp_path / "1", server) as one:
        assert measured(one, WELL).outcome is Outcome.OK
    first = server.pid
    assert first is not None
    os.kill(first, signal.SIGSTOP)
    with launch(tmp_path / "2", server) as other:
        record = measured(other, WELL)
    assert record.outcome is Outcome.OK and record.launch_mode == "fork"
    assert server.pid not in (None, first)
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
