"""Each real fault ends its launch with its own outcome, names its cause and leaves no process.

On forked ranks, as in a search; `make test-slow` repeats them on ranks that start cold.

The signals come from outside the ranks, in mid-trial: a launch calls `on_tick` ten times a second,
and the test sends its signal from there once every rank has finished the first rung.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from autotune.trial.forkserver import ForkServer
from autotune.trial.launch import Ended, Limits, native_ops_dir
from autotune.trial.native_ops import build_native_ops
from autotune.trial.outcome import read_rungs
from autotune.trial.protocol import Measurement, Outcome, Request
from autotune.trial.record import TrialRecord
from tests.integration.commands import (
    assert_nothing_left,
    finished_rungs,
    rank_pid,
    rank_pids,
)
from tests.integration.ranks import (
    forking_starter,
    make_plan,
    run,
    run_well,
    trial_request,
)

pytestmark = pytest.mark.integration


@pytest.fixture(params=["fork", pytest.param("cold", marks=pytest.mark.slow)])
def starter(request: pytest.FixtureRequest) -> ForkServer | None:
    return forking_starter() if request.param == "fork" else None


def records_of(request: Request, ended: Ended) -> list[TrialRecord]:
    return read_rungs(request, ended.results, ended.outcome, ended.message)


class Once:
    """An `on_tick` that acts once, when every rank has finished a rung and is in the next one."""

    def __init__(self, folder: Path, act: Callable[[], object]) -> None:
        self._folder, self._act = folder, act
        self.acted_at: float | None = None

    def __call__(self) -> None:
        ready = all(finished_rungs(self._folder, rank) >= 1 for rank in (0, 1))
        if self.acted_at is None and ready:
            assert rank_pids(self._folder)
            self.acted_at = time.monotonic()
            self._act()


def many_rungs(folder: Path, strategy: str = "fsdp2") -> Request:
    """A trial of many short rungs: one is soon finished, and another is under way."""
    return trial_request(
        make_plan(strategy, 2),
        folder,
        rungs=[(size, 2) for size in range(1, 60)],
        measurement=Measurement(min_steps=3, max_steps=10, target_seconds=0.5),
    )


def test_without_the_shim_fsdp2_on_cpu_is_invalid_and_the_engine_that_ran_is_named(
    tmp_path: Path,
) -> None:
    request = trial_request(make_plan("fsdp2", 2), tmp_path, rungs=[(1, 2)])
    ended = run(request, environment={"AUTOTUNE_NO_CPU_SHIM": "1"})
    assert ended.outcome is Outcome.INVALID
    assert "engine: asked for fsdp2, but ddp runs" in ended.message
    assert [record.outcome for record in records_of(request, ended)] == [Outcome.INVALID]


def test_a_rank_killed_from_outside_ends_the_trial_and_is_named(
    tmp_path: Path, starter: ForkServer | None
) -> None:
    request = many_rungs(tmp_path)

    def kill_rank_1() -> None:
        os.kill(rank_pid(tmp_path, 1), signal.SIGKILL)

    kill = Once(tmp_path, kill_rank_1)
    ended = run(request, on_tick=kill, starter=starter)
    assert kill.acted_at is not None
    assert time.monotonic() - kill.acted_at < 15, "the other rank must not wait for its deadline"
    assert (ended.outcome, ended.rank) == (Outcome.CRASHED, 1), ended.message
    assert "rank 1 was killed by SIGKILL" in ended.message
    assert ended.exit_codes[1] == -signal.SIGKILL
    *kept, last = records_of(request, ended)
    assert kept and all(record.outcome is Outcome.OK for record in kept)
    assert last.outcome is Outcome.CRASHED and last.tokens_per_s is None
    assert_nothing_left(tmp_path)


def test_a_stopped_rank_is_a_hang_and_its_process_is_gone(
    tmp_path: Path, starter: ForkServer | None
) -> None:
    request = many_rungs(tmp_path)

    def stop_rank_1() -> None:
        os.kill(rank_pid(tmp_path, 1), signal.SIGSTOP)

    stop = Once(tmp_path, stop_rank_1)
    ended = run(request, on_tick=stop, starter=starter)
    assert (ended.outcome, ended.rank) == (Outcome.HANG, 1), ended.message
    assert "rank 1 was stopped by a signal" in ended.message
    *kept, last = records_of(request, ended)
    assert kept and all(record.outcome is Outcome.OK for record in kept)
    assert last.outcome is Outcome.HANG
    assert_nothing_left(tmp_path)


def test_silent_ranks_are_a_hang(tmp_path: Path, starter: ForkServer | None) -> None:
    """Both ranks run and none is stopped: only their silence tells.

    A micro-step of 256 sequences takes seconds, many times the limit.
    """
    request = trial_request(make_plan("ddp", 2), tmp_path, rungs=[(256, 2)])
    ended = run(request, Limits(deadline_s=240, hang_s=0.3), starter=starter)
    assert ended.outcome is Outcome.HANG, ended.message
    assert "no rank made progress" in ended.message
    assert_nothing_left(tmp_path)


@pytest.mark.slow
def test_a_rank_that_crashes_far_below_its_memory_limit_did_not_run_out(tmp_path: Path) -> None:
    request = many_rungs(tmp_path).model_copy(update={"memory_limit_bytes": 4 * 2**30})
    crash = Once(tmp_path, lambda: os.kill(rank_pid(tmp_path, 1), signal.SIGSEGV))
    ended = run(request, on_tick=crash, starter=forking_starter())
    assert (ended.outcome, ended.rank) == (Outcome.CRASHED, 1), ended.message
    assert "rank 1 was killed by SIGSEGV with" in ended.message
    assert "left below its memory limit: a crash, not for want of memory" in ended.message
    assert str(ended.phase) == "step"
    assert_nothing_left(tmp_path)


def test_a_trial_past_its_deadline_is_a_timeout_and_keeps_its_rungs(tmp_path: Path) -> None:
    plan = make_plan("ddp", 2)
    # The fork server is up after this: a cold start may take as long as the deadline.
    run_well(trial_request(plan, tmp_path / "before", rungs=[(1, 2)]))
    request = trial_request(plan, tmp_path, rungs=[(size, 2) for size in range(1, 200)])
    ended = run(request, Limits(deadline_s=10, hang_s=120), starter=forking_starter())
    assert ended.outcome is Outcome.TIMEOUT
    assert "deadline of 10 s" in ended.message
    assert 10 <= ended.elapsed_s < 20
    *kept, last = records_of(request, ended)
    assert kept and all(record.outcome is Outcome.OK for record in kept)
    assert last.outcome is Outcome.TIMEOUT
    assert_nothing_left(tmp_path)


def test_out_of_memory_ends_the_ladder_and_keeps_the_rungs_below(
    tmp_path: Path, starter: ForkServer | None
) -> None:
    request = trial_request(
        make_plan("ddp", 2),
        tmp_path,
        rungs=[(1, 2), (2, 2), (4096, 2), (8192, 2)],
        memory_limit_bytes=200 * 2**20,
    )
    ended = run(request, starter=starter)
    assert ended.outcome is Outcome.OOM, ended.message
    records = records_of(request, ended)
    assert [r.plan["micro_batch_size"] for r in records] == [1, 2, 4096], "nobody tried 8192"
    assert [r.outcome for r in records] == [Outcome.OK, Outcome.OK, Outcome.OOM]
    assert "accumulation 2" in records[-1].message
    assert all(record.tokens_per_s for record in records[:2])
    assert_nothing_left(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "limit_mib"), [("ddp", 5), ("zero2", 20), ("fsdp2", 20)])
def test_memory_that_ends_before_the_first_step_is_out_of_memory_too(
    strategy: str, limit_mib: int, tmp_path: Path
) -> None:
    """Imports, threads and oneDNN fail in words of their own there, none of which says memory."""
    plan, limit = make_plan(strategy, 2), limit_mib * 2**20
    request = trial_request(plan, tmp_path, rungs=[(1, 2), (2, 2)], memory_limit_bytes=limit)
    ended = run(request)
    assert ended.outcome is Outcome.OOM, ended.message
    assert [record.outcome for record in records_of(request, ended)] == [Outcome.OOM]
    assert_nothing_left(tmp_path)


def test_a_planted_build_lock_neither_hangs_nor_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank killed while an operator was built leaves such a lock; the next run waits for it.

    In a copy of the cache: tests that run beside this one must not meet the lock.
    """
    request = trial_request(make_plan("zero1", 2), tmp_path / "launch", rungs=[(1, 2)])
    build_native_ops(request, tmp_path / "launch")
    operator = Path("torch_extensions", "deepspeed_shm_comm")
    shutil.copytree(native_ops_dir() / operator.name, tmp_path / operator)
    monkeypatch.setenv("AUTOTUNE_CACHE_DIR", str(tmp_path))
    lock = native_ops_dir() / operator.name / "lock"
    assert lock.parent == tmp_path / operator and lock.with_name(f"{operator.name}.so").exists()
    lock.touch()
    hour_ago = time.time() - 3600
    os.utime(lock, (hour_ago, hour_ago))
    notes: list[str] = []
    build_native_ops(request, tmp_path / "launch", note=notes)
    assert notes == ["removed a stale build lock of deepspeed_shm_comm"]
    assert not lock.exists()
    assert run(request).outcome is Outcome.OK
