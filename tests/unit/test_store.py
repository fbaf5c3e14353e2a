"""Records survive a kill in mid-write, and stale build locks do not."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from autotune.plan import Engine, Plan
from autotune.trial.native_ops import needed_ops, remove_stale_locks
from autotune.trial.protocol import Outcome
from autotune.trial.record import TrialRecord
from autotune.trial.store import RECORDS_FILE, RecordStore, read_records


def record(size: int, outcome: Outcome = Outcome.OK, **changes: object) -> TrialRecord:
    plan = Plan(strategy="ddp", engine=Engine.DDP, dp_replicate=2, micro_batch_size=size)
    values = {
        "launch": 1,
        "plan_id": plan.id,
        "outcome": outcome,
        "message": "",
        "plan": plan.to_dict(),
        "step_times_s": (1.0, 2.0),
        "measured_accum_steps": (1, 2),
    }
    return TrialRecord(**(values | changes))


def test_records_come_back_equal_and_in_order(tmp_path: Path):
    given = [record(4), record(1, Outcome.OOM), record(2)]
    RecordStore(tmp_path).add(given)
    assert RecordStore(tmp_path).all() == given
    assert RecordStore(tmp_path).get(given[1].plan_id) == given[1]


def test_a_plan_is_recorded_once(tmp_path: Path):
    store = RecordStore(tmp_path)
    store.add([record(1)])
    before = (tmp_path / RECORDS_FILE).read_bytes()
    assert store.add([record(1, Outcome.CRASHED)]) == []
    assert RecordStore(tmp_path).add([record(1, Outcome.OOM), record(2)]) == [record(2)]
    after = (tmp_path / RECORDS_FILE).read_bytes()
    assert after.startswith(before) and after.count(b"\n") == 2


@pytest.mark.parametrize("keep", [1, 50, -1])
def test_a_half_written_line_is_cut_and_the_next_starts_clean(tmp_path: Path, keep: int):
    store = RecordStore(tmp_path)
    store.add([record(1)])
    whole = (tmp_path / RECORDS_FILE).read_bytes()
    store.add([record(2)])
    data = (tmp_path / RECORDS_FILE).read_bytes()
    torn = whole + data[len(whole) :][:keep]
    (tmp_path / RECORDS_FILE).write_bytes(torn)
    assert read_records(tmp_path / RECORDS_FILE) == [record(1)], "reading alone copes, too"
    again = RecordStore(tmp_path)
    assert (tmp_path / RECORDS_FILE).read_bytes() == whole
    again.add([record(3)])
    assert RecordStore(tmp_path).all() == [record(1), record(3)]


def test_a_file_with_half_a_line_alone_is_empty(tmp_path: Path):
    (tmp_path / RECORDS_FILE).write_text('{"launch": 1')
    assert RecordStore(tmp_path).all() == []


def make_lock(cache: Path, age_s: float) -> Path:
    lock = cache / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    born = time.time() - age_s
    os.utime(lock, (born, born))
    return lock


def test_an_old_build_lock_is_removed(tmp_path: Path):
    lock = make_lock(tmp_path, age_s=60)
    assert remove_stale_locks(tmp_path) == ["cpu_adam"]
    assert not lock.exists()


def test_a_lock_that_a_living_rank_lets_go_is_not_taken_from_it(tmp_path: Path):
    lock = make_lock(tmp_path, age_s=0)
    timer = threading.Timer(0.3, lock.unlink)
    timer.start()
    assert remove_stale_locks(tmp_path) == []
    timer.join()


def test_only_deepspeed_needs_built_operators():
    zero = Plan(strategy="zero2", engine=Engine.DEEPSPEED, zero_stage=2, dp_shard=2)
    offload = Plan(
        strategy="z", engine=Engine.DEEPSPEED, zero_stage=2, dp_shard=2, offload_optimizer=True
    )
    fsdp2 = Plan(strategy="fsdp2", engine=Engine.FSDP2, dp_shard=2)
    assert needed_ops(fsdp2, "cpu") == []
    assert needed_ops(zero, "cuda") == []
    assert needed_ops(zero, "cpu") == ["ShareMemCommBuilder"]
    assert needed_ops(offload, "cuda") == ["CPUAdamBuilder"]


def test_a_lock_that_others_take_again_and_again_is_not_waited_for(tmp_path: Path):
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    done = threading.Event()

    def take_again():
        while not done.wait(0.02):
            new = tmp_path / "new"
            new.touch()
            new.replace(lock)

    taker = threading.Thread(target=take_again)
    taker.start()
    try:
        assert remove_stale_locks(tmp_path) == []
    finally:
        done.set()
        taker.join()
    assert lock.exists()
