"""The recorder of landscapes: its rows, its rounds, and going on where it stopped."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from record import better_part, projected_round_s
from record_clock import LaunchClock
from record_rows import Row, RowFile, rows_of, rungs_of
from record_spaces import LANDSCAPES, Arm, arms_of, landscape_named
from record_story import Story

from autotune.errors import AutotuneError
from autotune.trial.launch import Ended
from autotune.trial.protocol import (
    AccumulationResult,
    Measurement,
    ModelSource,
    Outcome,
    RankResult,
    Request,
    RungResult,
    heartbeat_file,
    rank_result_file,
    write_message,
)

LANDSCAPE = landscape_named("cpu2-s128")
ARMS, _ = arms_of(LANDSCAPE)
DDP = next(arm for arm in ARMS if arm.name == "ddp")


def request(arm: Arm) -> Request:
    return Request(
        launch_id="one",
        mode="trial",
        model=ModelSource(name="tiny-qwen3", config={"model_type": "qwen3"}),
        plan=arm.first.to_dict(),
        workload=LANDSCAPE.workload(),
        device="cpu",
        out_dir="nowhere",
        rungs=rungs_of(arm.plans),
    )


def part(grad_accum_steps: int, step_s: list[float]) -> AccumulationResult:
    return AccumulationResult(
        grad_accum_steps=grad_accum_steps,
        step_s=step_s,
        micro_step_s=[0.1] * len(step_s) * (grad_accum_steps - 1),
        sync_micro_step_s=[0.2] * len(step_s),
        optimizer_step_s=[0.05] * len(step_s),
        valid_tokens=[1000] * len(step_s),
        mean_step_tokens=1000.0,
        peak_allocated_bytes=5,
        peak_reserved_bytes=6,
    )


def result(rank: int, rungs: list[RungResult]) -> RankResult:
    return RankResult(launch_id="one", rank=rank, world_size=2, complete=True, rungs=rungs)


def rung(size: int, grad_accum_steps: int, step_s: list[float]) -> RungResult:
    return RungResult(
        micro_batch_size=size,
        outcome=Outcome.OK,
        accumulations=[part(grad_accum_steps, step_s)],
    )


def ended(results: list[RankResult], outcome: Outcome = Outcome.OK, message: str = "") -> Ended:
    return Ended(
        outcome=outcome,
        message=message,
        rank=None,
        exit_codes=[0, 0],
        elapsed_s=20.0,
        results=results,
    )


def launched() -> list[Row]:
    """DDP: the first rung ran, the second broke the memory, nobody tried the third."""
    oom = RungResult(micro_batch_size=2, outcome=Outcome.OOM, message="no memory for 1 MiB more")
    ranks = [
        result(0, [rung(1, 4, [0.5, 0.7, 0.6]), oom]),
        result(1, [rung(1, 4, [0.6, 0.5, 0.6]), oom]),
    ]
    clock = LaunchClock(folder=Path("nowhere"), num_ranks=2, ready_s=4.0, wall_s={1: 2.6})
    oom = ended(ranks, Outcome.OOM, "no memory")
    return rows_of(DDP, request(DDP), oom, clock, round_number=1, launch=7, mode="cold")


def test_a_row_holds_the_slowest_rank_and_the_true_accumulation() -> None:
    first, second = launched()
    assert json.loads(first.step_times_s) == [0.6, 0.7, 0.6]
    assert (first.micro_batch_size, first.grad_accum_steps, first.launch) == (1, 4, 7)
    assert first.rung_wall_s == 2.6 and first.launch_ready_s == 4.0
    assert first.warmup_s == pytest.approx(2.6 - 1.9)
    assert first.step_tokens == 1000.0 and first.plan_id == DDP.plans[0].id
    assert second.outcome == "oom" and second.message == "no memory for 1 MiB more"
    assert second.step_times_s == "[]" and second.step_tokens is None and second.warmup_s is None
    # All that is left of the 20 s: a search pays for a failed rung to the end of its launch.
    assert second.rung_wall_s == pytest.approx(20.0 - 4.0 - 2.6)


def test_a_composed_time_is_refused() -> None:
    ranks = [result(number, [rung(1, 2, [0.5])]) for number in (0, 1)]
    clock = LaunchClock(folder=Path("nowhere"), num_ranks=2, ready_s=4.0, wall_s={1: 2.6})
    with pytest.raises(AutotuneError, match="true accumulations"):
        rows_of(DDP, request(DDP), ended(ranks), clock, round_number=1, launch=1, mode="cold")


def test_the_clock_reads_the_files_of_the_ranks(tmp_path: Path) -> None:
    clock = LaunchClock(folder=tmp_path, num_ranks=2, started=1000.0)

    def touch(name: str, at: float) -> None:
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (at, at))

    touch(heartbeat_file(0), 990.0)  # of an earlier launch
    clock.look()
    touch(heartbeat_file(0), 1003.0)
    clock.look()
    touch(heartbeat_file(1), 1004.0)
    clock.look()
    assert clock.ready_s == 4.0
    touch(heartbeat_file(0), 1006.0)  # the later ones tell nothing
    done = [rung(1, 4, [0.5]), rung(2, 2, [0.5])]
    for rank, ends in ((0, (1010.0, 1015.0)), (1, (1009.0, 1016.0))):
        for number, at in enumerate(ends, 1):
            name = rank_result_file(rank)
            write_message(result(rank, done[:number]), tmp_path / name)
            os.utime(tmp_path / name, (at, at))
            clock.look()
    assert clock.ready_s == 4.0
    assert clock.wall_s == {1: 7.0, 2: 7.0}


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    RowFile(path).add(launched())
    again = RowFile(path)
    assert again.rows == launched()
    assert again.next_launch() == 8
    assert again.measured(1) == {plan.id for plan in DDP.plans[:2]} and not again.measured(2)


def test_a_half_written_row_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    RowFile(path).add(launched())
    path.write_bytes(path.read_bytes()[:-20])
    assert RowFile(path).rows == launched()[:1]
    RowFile(path).add(launched()[1:])
    assert RowFile(path).rows == launched()


def test_later_rounds_repeat_the_better_half() -> None:
    plans = [plan for arm in ARMS[:4] for plan in arm.plans]
    (row, _) = launched()
    rows = [
        replace(row, plan_id=plan.id, step_times_s=json.dumps([1.0 + number]))
        for number, plan in enumerate(plans)
    ]
    failed = replace(row, plan_id=ARMS[4].plans[0].id, step_times_s="[]", step_tokens=None)
    kept = better_part(ARMS, [*rows, failed])
    assert [plan for arm in kept for plan in arm.plans] == plans[: len(plans) // 2]


def test_the_projection_is_the_sum_of_what_was_measured() -> None:
    row = launched()[0]
    rows = [
        replace(row, micro_batch_size=plan.micro_batch_size, grad_accum_steps=plan.grad_accum_steps)
        for plan in DDP.plans
    ]
    assert projected_round_s([DDP], rows) == pytest.approx(4.0 + 3 * 2.6)
    assert projected_round_s([DDP], []) == 0.0


def test_another_landscape_is_not_gone_on_with(tmp_path: Path) -> None:
    path, measurement = tmp_path / "x.json", Measurement(max_steps=5)
    Story(path, LANDSCAPE, measurement, None)
    Story(path, LANDSCAPE, measurement, None)
    assert len(json.loads(path.read_text())["sessions"]) == 2
    with pytest.raises(AutotuneError, match="measurement"):
        Story(path, LANDSCAPE, Measurement(max_steps=6), None)
    with pytest.raises(AutotuneError, match="workload"):
        Story(path, landscape_named("cpu2-s256"), measurement, None)


def test_the_landscapes_are_what_they_say() -> None:
    for landscape in LANDSCAPES.values():
        if landscape.device == "cuda":
            continue
        arms, refused = arms_of(landscape)
        plans = [plan for arm in arms for plan in arm.plans]
        assert {plan.strategy for plan in plans} == set(landscape.strategies), refused
        assert len({plan.id for plan in plans}) == len(plans)
        assert {plan.global_batch_size for plan in plans} == {landscape.global_batch_size}
        assert {plan.world_size for plan in plans} == {landscape.ranks}
    over_hosts, _ = arms_of(landscape_named("cpu4-2hosts"))
    hybrid = next(arm for arm in over_hosts if arm.name == "hsdp")
    assert (hybrid.first.dp_replicate, hybrid.first.dp_shard) == (2, 2)
    with pytest.raises(AutotuneError, match="cpu2-s128"):
        landscape_named("cpu3")
