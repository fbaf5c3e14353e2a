"""From rank results to records, and from rank failures to the one that caused them."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from autotune.plan import Engine, Plan
from autotune.spec.workload import Workload
from autotune.trial.outcome import median_interval, read_rungs
from autotune.trial.protocol import (
    AccumulationResult,
    ModelSource,
    Outcome,
    Phase,
    RankError,
    RankResult,
    Rehearsal,
    Request,
    Rung,
    RungResult,
)
from autotune.trial.ranks import LocalRank
from autotune.trial.verdict import Ended
from autotune.trial.verdict import conclude as conclude_launch
from autotune.trial.watch import Rank

MIB = 2**20
PLAN = Plan(strategy="ddp", engine=Engine.DDP, dp_replicate=2)


def request(*rungs: tuple[int, int]) -> Request:
    return Request(
        launch_id="0001", mode="trial", model=ModelSource(name="m", config={}),
        plan=PLAN.to_dict(), workload=Workload(), device="cpu", out_dir="x",
        rungs=[Rung(micro_batch_size=size, grad_accum_steps=steps) for size, steps in rungs],
    )  # fmt: skip


def accumulation(steps: int = 2, *, whole: float = 1.0, tokens: int = 200, **changes: object):
    values = {
        "grad_accum_steps": steps,
        "step_s": [whole] * 3,
        "micro_step_s": [0.3] * 3 * (steps - 1),
        "sync_micro_step_s": [0.5] * 3,
        "optimizer_step_s": [0.1] * 3,
        "valid_tokens": [tokens] * 3,
        "mean_step_tokens": tokens,
        "peak_allocated_bytes": 100,
        "peak_reserved_bytes": 150,
    }
    return AccumulationResult(**(values | changes))


def ok(size: int, *parts: AccumulationResult) -> RungResult:
    return RungResult(
        micro_batch_size=size, outcome=Outcome.OK, accumulations=list(parts) or [accumulation()]
    )


def result(rank: int, *rungs: RungResult, error: RankError | None = None) -> RankResult:
    return RankResult(
        launch_id="0001", rank=rank, world_size=2, complete=True, rungs=list(rungs), error=error
    )


def read(asked: Request, results: list[RankResult], outcome=Outcome.OK, message=""):
    return read_rungs(asked, results, outcome, message)


def test_the_slowest_rank_sets_the_step_and_tokens_are_of_all_ranks():
    results = [result(0, ok(1)), result(1, ok(1, accumulation(whole=2.0)))]
    (record,) = read(request((1, 2)), results)
    assert (record.step_s, record.tokens_per_s) == (2.0, 100.0)
    assert record.plan_object.micro_batch_size == 1 and record.plan_id == record.plan_object.id
    assert (record.peak_allocated_bytes, record.peak_reserved_bytes) == (100, 150)


def test_a_longer_accumulation_is_composed_from_the_measured_one():
    """6 more micro-steps of 0.3 s, each with its share 0.05 of the step's untimed 0.1 s."""
    (record,) = read(request((1, 8)), [result(0, ok(1)), result(1, ok(1))])
    assert record.step_s == pytest.approx(1.0 + 6 * 0.35)
    assert record.tokens_per_s == pytest.approx(800 / 3.1)
    assert record.measured_accum_steps == (2,)


def test_what_a_rung_happened_to_read_does_not_rank_it():
    """Two equally fast configurations, of data with 450 labels a sequence on average."""
    rich = accumulation(2, tokens=930, mean_step_tokens=900.0)
    poor = accumulation(1, tokens=386, mean_step_tokens=450.0)
    records = [
        *read(request((1, 2)), [result(rank, ok(1, rich)) for rank in (0, 1)]),
        *read(request((1, 2)), [result(rank, ok(1, rich, poor)) for rank in (0, 1)]),
        *read(request((1, 4)), [result(rank, ok(1, rich)) for rank in (0, 1)]),
        *read(request((1, 1)), [result(rank, ok(1, poor)) for rank in (0, 1)]),
    ]
    tokens = [(record.step_tokens, record.step_tokens_read) for record in records]
    assert tokens == [(900.0, 930.0), (900.0, 930.0), (1800.0, 1860.0), (450.0, 386.0)]
    for record in records:
        assert record.tokens_per_s == record.step_tokens / record.step_s


def test_a_measured_accumulation_is_taken_as_it_is():
    parts = [accumulation(1, whole=0.8, tokens=100), accumulation(4, whole=2.0, tokens=400)]
    (record,) = read(request((1, 1)), [result(0, ok(1, *parts)), result(1, ok(1, *parts))])
    assert (record.step_s, record.tokens_per_s) == (0.8, 125.0)
    assert record.micro_step_s is None, "accumulation 1 has no micro-step without synchronisation"


def test_the_rung_that_ran_out_of_memory_is_recorded_and_none_above():
    failed = RungResult(micro_batch_size=2, outcome=Outcome.OOM, message="at accumulation 1: full")
    results = [result(0, ok(1), failed), result(1, ok(1))]
    records = read(request((1, 2), (2, 1), (4, 1)), results, Outcome.OOM, "full")
    assert [(r.plan["micro_batch_size"], r.outcome) for r in records] == [
        (1, Outcome.OK),
        (2, Outcome.OOM),
    ]
    assert records[1].message == "at accumulation 1: full" and records[1].tokens_per_s is None


def test_a_rung_only_one_rank_finished_is_not_measured():
    records = read(request((1, 2)), [result(0, ok(1)), result(1)], Outcome.CRASHED, "rank 1 died")
    assert [(r.outcome, r.message, r.tokens_per_s) for r in records] == [
        (Outcome.CRASHED, "rank 1 died", None)
    ]


def test_a_rank_that_says_oom_does_not_hide_that_another_was_killed_first():
    failed = RungResult(micro_batch_size=1, outcome=Outcome.OOM, message="full")
    (record,) = read(request((1, 2)), [result(0, failed), result(1)], Outcome.CRASHED, "killed")
    assert (record.outcome, record.message) == (Outcome.CRASHED, "killed")


@pytest.mark.parametrize(("retries", "outcome"), [(1, Outcome.OK), (2, Outcome.THRASH)])
def test_allocator_retries_are_thrash(retries: int, outcome: Outcome):
    parts = accumulation(alloc_retries=retries)
    (record,) = read(request((1, 2)), [result(0, ok(1)), result(1, ok(1, parts))])
    assert record.outcome is outcome


@pytest.mark.parametrize(("used", "outcome"), [(979, Outcome.OK), (981, Outcome.THRASH)])
def test_a_device_nearly_full_is_thrash(used: int, outcome: Outcome):
    parts = accumulation(device_used_bytes=used, device_total_bytes=1000)
    (record,) = read(request((1, 2)), [result(0, ok(1)), result(1, ok(1, parts))])
    assert record.outcome is outcome


@pytest.mark.parametrize("wrong", [0.0, math.nan])
def test_a_step_without_a_time_is_invalid(wrong: float):
    parts = accumulation()
    parts.step_s[1] = wrong
    (record,) = read(request((1, 2)), [result(0, ok(1)), result(1, ok(1, parts))])
    assert (record.outcome, record.step_s) == (Outcome.INVALID, None)
    assert f"a step took {wrong} s" in record.message


def test_a_rung_cut_short_keeps_what_was_measured_and_says_so():
    short = ok(1).model_copy(update={"cut_short": True, "wall_s": 2.5})
    (record,) = read(request((1, 2)), [result(0, short), result(1, ok(1))])
    assert record.outcome is Outcome.OK and record.cut_short and record.rung_wall_s == 2.5
    assert record.step_times_s == (1.0,) * 3


def rehearsal(save_s: float, peak: int) -> Rehearsal:
    return Rehearsal(
        evaluation_s=0.5, save_s=save_s, checkpoint_bytes=9,
        peak_allocated_bytes=peak, peak_reserved_bytes=peak,
    )  # fmt: skip


def test_a_rehearsals_peak_counts_and_so_does_its_failure():
    asked = request((1, 2)).model_copy(update={"rehearses": True})
    results = [
        result(n, ok(1)).model_copy(update={"rehearsal": rehearsal(2.0 + n, 10**9 * (1 + n))})
        for n in (0, 1)
    ]
    (record,) = read_rungs(asked, results, Outcome.OK, "")
    assert (record.evaluation_s, record.save_s) == (0.5, 3.0)
    assert record.peak_allocated_bytes == record.peak_reserved_bytes == 2 * 10**9
    (failed,) = read_rungs(asked, [result(n, ok(1)) for n in (0, 1)], Outcome.OOM, "saving")
    assert (failed.outcome, failed.message, failed.step_s) == (Outcome.OOM, "saving", None)


def test_interval_of_a_median():
    """t(0.975, 3) = 3.18, standard error of a median sqrt(pi / 2) s / sqrt(n), s = sqrt(5 / 3)."""
    spread = median_interval([10.0, 11.0, 12.0, 13.0])
    assert spread.median == 11.5
    assert spread.high - 11.5 == pytest.approx(3.18 * 1.2533141 * math.sqrt(5 / 3) / 2)
    assert 11.5 - spread.low == pytest.approx(spread.high - 11.5)
    assert median_interval([5.0]).high == math.inf
    assert median_interval([1.0, 100.0]).low == 0.0


# The cause of a failed launch


def ended_rank(
    number: int, code: int, *, alive_at: float, ended_at: float | None, left: int | None = None
) -> Rank:
    process = SimpleNamespace(returncode=code, memory_left=lambda: left)
    return Rank(number=number, process=process, alive_at=alive_at, ended_at=ended_at)  # type: ignore[arg-type]


def said(outcome: Outcome, message: str, time_s: float) -> RankError:
    return RankError(outcome=outcome, message=message, traceback="", time_s=time_s)


def conclude(
    ranks: list[Rank], results: list[RankResult], host_oom: bool = False, limit: int | None = None
):
    return conclude_launch(
        ranks, results, None, 1.0, host_out_of_memory=host_oom, memory_limit_bytes=limit
    )


def silent(rank: int) -> RankResult:
    return RankResult(launch_id="0001", rank=rank, world_size=2)


def test_a_killed_rank_is_the_cause_though_the_other_spoke_before_its_death_was_noticed():
    """Killed at 10.02, the other's collective fails at 10.03, the parent looks at 10.1."""
    ranks = [
        ended_rank(0, 1, alive_at=10.0, ended_at=10.1),
        ended_rank(1, -9, alive_at=10.0, ended_at=10.1),
    ]
    lost = said(Outcome.CRASHED, "connection closed by peer", 10.03)
    ended = conclude(ranks, [result(0, error=lost), silent(1)])
    assert (ended.rank, ended.message) == (1, "rank 1 was killed by SIGKILL")


def test_a_signal_without_a_name_is_told_by_its_number():
    ranks = [ended_rank(n, -35, alive_at=10.0, ended_at=10.1) for n in (0, 1)]
    ended = conclude(ranks, [silent(0), silent(1)])
    assert (ended.outcome, ended.message) == (Outcome.CRASHED, "rank 0 was killed by signal 35")


def test_the_rank_that_ran_out_first_is_the_cause():
    ranks = [ended_rank(n, 1, alive_at=9.9, ended_at=10.1) for n in (0, 1)]
    lost = said(Outcome.CRASHED, "connection closed by peer", 10.05)
    full = said(Outcome.OOM, "full", 10.01)
    ended = conclude(ranks, [result(0, error=lost), result(1, error=full)])
    assert (ended.rank, ended.outcome, ended.message) == (1, Outcome.OOM, "full")


def test_a_rank_stopped_by_us_is_not_a_cause():
    ranks = [
        ended_rank(0, -15, alive_at=9.0, ended_at=None),
        ended_rank(1, 1, alive_at=9.9, ended_at=10.0),
    ]
    ended = conclude(ranks, [silent(0), result(1, error=said(Outcome.OOM, "full", 9.95))])
    assert (ended.rank, ended.outcome) == (1, Outcome.OOM)


def test_sigkill_with_a_kernel_oom_kill_is_host_memory():
    ranks = [ended_rank(0, -9, alive_at=1.0, ended_at=1.1)]
    assert conclude(ranks, [silent(0)], host_oom=True).outcome is Outcome.HOST_OOM
    assert conclude(ranks, [silent(0)], host_oom=False).outcome is Outcome.CRASHED


@pytest.mark.parametrize("code", [-6, -11])
def test_a_native_death_is_out_of_memory_near_the_limit_alone(code: int):
    def ended(left: int | None, limit: int | None = 800 * MIB) -> Ended:
        rank = ended_rank(0, code, alive_at=1.0, ended_at=1.1, left=left)
        return conclude([rank], [silent(0)], limit=limit)

    near, far = ended(99 * MIB), ended(101 * MIB)  # an eighth of the limit
    assert near.outcome is Outcome.OOM and near.phase is Phase.LOAD
    assert near.message.endswith("with 99.0 MiB left below its memory limit, as native code is "
                                 "that gets none")  # fmt: skip
    assert far.outcome is Outcome.CRASHED
    assert far.message.endswith("101.0 MiB left below its memory limit: a crash, not for want of "
                                "memory")  # fmt: skip
    assert ended(-1).outcome is Outcome.OOM, "a limit put on what was taken already"
    assert ended(15 * MIB, limit=None).outcome is Outcome.OOM  # a limit of the shell's
    assert ended(17 * MIB, limit=None).outcome is Outcome.CRASHED
    unseen = ended(None)
    assert unseen.outcome is Outcome.CRASHED and "memory" not in unseen.message


def test_another_signal_is_a_crash_however_little_was_left():
    rank = ended_rank(0, -15, alive_at=1.0, ended_at=1.1, left=0)
    assert conclude([rank], [silent(0)], limit=MIB).outcome is Outcome.CRASHED


LIMITED = """
import mmap, os, resource, signal, sys, time
status = open("/proc/self/status").read()
taken = int(status.partition("VmData:")[2].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (taken + 256 * 2**20, resource.RLIM_INFINITY))
held = mmap.mmap(-1, int(sys.argv[1]) * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
print("there", flush=True)
time.sleep(float(sys.argv[2]))
os.kill(os.getpid(), signal.SIGSEGV)
"""


@pytest.mark.parametrize(
    ("taken_mib", "outcome"), [(240, Outcome.OOM), (100, Outcome.CRASHED)]
)  # fmt: skip
def test_what_a_process_had_left_is_seen_before_it_dies(taken_mib: int, outcome: Outcome):
    with subprocess.Popen(
        [sys.executable, "-c", LIMITED, str(taken_mib), "1"], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"there\n"
        rank = Rank(number=0, process=LocalRank(process), alive_at=1.0)
        while rank.process.poll() is None:
            time.sleep(0.02)
    rank.ended_at = 1.1
    left = rank.process.memory_left()
    assert left is not None and abs(left - (256 - taken_mib) * MIB) < 4 * MIB
    ended = conclude([rank], [silent(0)], limit=256 * MIB)
    assert ended.outcome is outcome and "SIGSEGV" in ended.message


def test_an_abort_after_a_complete_result_is_a_note():
    ranks = [ended_rank(0, -6, alive_at=1.0, ended_at=1.1)]
    ended = conclude(ranks, [result(0)])
    assert ended.outcome is Outcome.OK
    assert ended.notes == ["rank 0 finished, then ended with -6"]
