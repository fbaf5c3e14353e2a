"""When a silent rank hangs: not while it may be writing a checkpoint."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from autotune.trial.protocol import (
    REQUEST_FILE,
    ModelSource,
    Outcome,
    Request,
    heartbeat_file,
    write_message,
)
from autotune.trial.ranks import LocalRank
from autotune.trial.record import TrialRecord
from autotune.trial.watch import Rank, Seen, Verdict, watch
from tests.unit.search_launches import two_families

(FAMILY, _), SMALL = two_families()
PARAMETERS = 8_000_000_000
CHECKPOINT_BYTES = 12 * PARAMETERS
"""Weights and Adam's two moments in fp32."""
JOB = replace(SMALL, num_parameters=PARAMETERS)
PLAN = FAMILY.ladder[0].plan
FINALIST = TrialRecord(
    launch=1, plan_id=PLAN.id, plan=PLAN.to_dict(), outcome=Outcome.OK, message="", step_s=1.0
)


@pytest.fixture
def rank(tmp_path: Path) -> Iterator[Rank]:
    request = Request(
        launch_id="one",
        mode="trial",
        model=ModelSource(name="none", config={}),
        plan=PLAN.to_dict(),
        workload=JOB.workload,
        device="cpu",
        out_dir=str(tmp_path),
    )
    write_message(request, tmp_path / REQUEST_FILE)
    process = subprocess.Popen(["sleep", "600"], start_new_session=True)
    yield Rank(number=0, process=LocalRank(process), alive_at=time.monotonic())
    process.kill()
    process.wait()


def seen(rank: Rank, folder: Path, hang_s: float, silent_s: float) -> Verdict | Seen:
    """Watch a rank that made progress so long ago, for three looks."""
    heartbeat = folder / heartbeat_file(0)
    heartbeat.touch()
    since = time.time() - silent_s
    os.utime(heartbeat, (since, since))
    looks = iter([False, False, True])
    return watch(
        [rank],
        folder,
        "one",
        hang_s=hang_s,
        deadline=None,
        on_tick=lambda: None,
        until=lambda: next(looks),
        poll_s=0.001,
    )


def test_a_rank_that_writes_a_large_checkpoint_is_waited_for(rank: Rank, tmp_path: Path) -> None:
    confirming = JOB.confirming_limits(FAMILY, FINALIST, None)
    saving_s = CHECKPOINT_BYTES / 150e6  # a slow file system
    assert seen(rank, tmp_path, confirming.hang_s, saving_s) is Seen.HOLDS
    assert confirming.deadline_s is not None and confirming.deadline_s > saving_s
    ordinary = JOB.limits(FAMILY, [], None)
    verdict = seen(rank, tmp_path, ordinary.hang_s, saving_s)
    assert isinstance(verdict, Verdict) and verdict.outcome is Outcome.HANG, "nothing is saved then"


def test_a_rank_that_is_silent_for_much_longer_hangs(rank: Rank, tmp_path: Path) -> None:
    hang_s = JOB.confirming_limits(FAMILY, FINALIST, None).hang_s
    verdict = seen(rank, tmp_path, hang_s, CHECKPOINT_BYTES / 20e6)
    assert isinstance(verdict, Verdict) and verdict.outcome is Outcome.HANG and verdict.rank == 0
