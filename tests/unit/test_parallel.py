"""Several loops of one search at once: disjoint devices, no family twice, stops and failures."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

pytest.importorskip("optuna")

import optuna

from autotune.errors import AutotuneError
from autotune.planner import Estimate
from autotune.search.asker import Asker
from autotune.search.book import Book
from autotune.search.loop import SPACE_SPENT, Loop
from autotune.search.parallel import Desk, Pinned, core_slots, gpu_slots, run_side_by_side
from autotune.search.samplers import make_sampler
from tests.unit.search_bench import MemoryStore, NoLimits, RuleBench, Watch, families_of


@pytest.mark.parametrize("sampler", ["grid", "tpe", "cost-model"])
def test_two_loops_share_a_search_and_no_family_is_measured_by_both_at_once(sampler: str):
    families = families_of("ddp", "zero2", "fsdp2", global_batch_size=8)
    both = threading.Barrier(2)
    met: list[set[str]] = []
    now: dict[int, str] = {}

    def rule(estimate: Estimate) -> float:
        """Wait for the other loop once, so that two launches surely run side by side."""
        first = threading.get_ident() not in now
        now[threading.get_ident()] = estimate.plan.family_id
        if first:
            both.wait(10)
            met.append(set(now.values()))
        return estimate.time.tokens_per_s

    book = Book(families, MemoryStore(), None)
    named = make_sampler(sampler, families, seed=0, tolerance=0.0)
    asker = Asker(optuna.storages.InMemoryStorage(), families, named, seed=0)
    asker.recover([])
    desk, benches = Desk(), [RuleBench(rule), RuleBench(rule)]
    loops = [Loop(bench, asker, book, NoLimits(), Watch(), desk) for bench in benches]
    because = run_side_by_side(loops, desk, lambda: None)
    made = [record for bench in benches for record in bench.made]
    assert {record.plan_id for record in made} == {r.plan_id for r in book.store.all()}
    assert len(made) == len({record.plan_id for record in made}), "nothing is measured twice"
    assert all(bench.made for bench in benches) and all(len(pair) == 2 for pair in met)
    if sampler != "cost-model":
        assert because == SPACE_SPENT
        assert len(made) == sum(len(family.ladder) for family in families)
    running = optuna.trial.TrialState.RUNNING
    assert not asker.study.get_trials(states=[running])


def test_a_failure_in_one_loop_stops_the_others_and_is_raised():
    stopped = threading.Event()

    class Fails:
        def run(self) -> str:
            raise AutotuneError("wrong columns")

    class Waits:
        def run(self) -> str:
            assert stopped.wait(10)
            return "stopped"

    desk = Desk()
    with pytest.raises(AutotuneError, match="wrong columns"):
        run_side_by_side([Waits(), Fails()], desk, stopped.set)
    assert desk.stopping


def test_what_launches_say_after_a_stop_is_not_recorded():
    families = families_of("ddp", global_batch_size=4)
    desk = Desk()

    def rule(estimate: Estimate) -> float:
        desk.stopping = True  # Ctrl-C while the rung is measured
        return estimate.time.tokens_per_s

    book = Book(families, MemoryStore(), None)
    named = make_sampler("grid", families, seed=0)
    asker = Asker(optuna.storages.InMemoryStorage(), families, named, seed=0)
    assert Loop(RuleBench(rule), asker, book, NoLimits(), Watch(), desk).run() == "interrupted"
    assert book.store.all() == []


def test_gpus_are_split_into_disjoint_sets(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in gpu_slots(2, 8, None)]
    assert found == ["0,1", "2,3", "4,5", "6,7"]
    assert [dict(slot.environment) for slot in gpu_slots(2, 3, None)] == [{}]
    assert len(gpu_slots(2, 8, 3)) == 3 and len(gpu_slots(8, 8, None)) == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1,GPU-a,7")
    found = [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in gpu_slots(2, 4, None)]
    assert found == ["3,1", "GPU-a,7"]
    with pytest.raises(AutotuneError, match=r"--parallel 5.* need 10, 8 are visible.*4 or less"):
        gpu_slots(2, 8, 5)


def test_cores_are_split_and_too_few_are_refused(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3, 4})
    assert [slot.cores for slot in core_slots(2, 2)] == [{0, 1}, {2, 3}]
    assert core_slots(2, None)[0].cores is None
    with pytest.raises(AutotuneError, match=r"need 6 cores, 5 are here.*--parallel 2 or less"):
        core_slots(2, 3)


def test_a_pinned_loops_children_have_its_cores():
    core = min(os.sched_getaffinity(0))

    class Child:
        def run(self) -> str:
            words = "import os; print(os.sched_getaffinity(0))"
            done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True)
            return done.stdout.strip()

    said: list[str] = []
    pinned = Pinned(Child(), frozenset({core}))
    thread = threading.Thread(target=lambda: said.append(pinned.run()))
    before = os.sched_getaffinity(0)
    thread.start()
    thread.join()
    assert said == [str({core})] and os.sched_getaffinity(0) == before
