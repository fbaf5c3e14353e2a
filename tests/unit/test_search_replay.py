"""The replay harness: what is drawn, what is charged, what counts as regret."""

from __future__ import annotations

import math
import statistics

import pytest

pytest.importorskip("optuna")

import landscape as landscapes
import replay as replays
from simulated import ReplayBench, counted_steps

from autotune.trial.protocol import Measurement, Outcome
from tests.unit.search_landscape import COLD_S, FAILS_AFTER_S, READY_S, STEP_TOKENS, made_up


@pytest.fixture(scope="module")
def land(tmp_path_factory) -> landscapes.Landscape:
    return made_up(tmp_path_factory.mktemp("landscapes"))


def test_the_best_has_no_regret_and_what_does_not_run_has_all(land):
    assert land.regret(land.best) == 0.0
    failed = next(p for p, rows in land.rows.items() if rows[0].outcome is Outcome.OOM)
    assert land.regret(failed) == land.regret(None) == 1.0
    worst = min(land.truth, key=lambda plan: land.truth[plan].rate)
    gap = 1 - land.truth[worst].rate / land.truth[land.best].rate
    assert land.regret(worst) == pytest.approx(gap)


def test_a_truth_is_the_mean_of_its_launches_and_that_means_error(land):
    rates = [row.rate for row in land.rows[land.best]]
    assert len(rates) == 3
    assert land.truth[land.best].rate == pytest.approx(statistics.mean(rates))
    error = statistics.stdev(rates) / math.sqrt(3)
    assert land.truth[land.best].error == pytest.approx(error)


def test_a_difference_within_the_noise_is_no_regret(land):
    best = land.truth[land.best]
    near = next(plan for plan in land.truth if plan != land.best)
    truth = dict(land.truth)
    truth[near] = landscapes.Truth(rate=best.rate - best.error, error=best.error)
    object.__setattr__(land, "truth", truth)
    try:
        assert land.regret(near) == 0.0
        truth[near] = landscapes.Truth(rate=best.rate - 2 * best.error, error=best.error)
        assert land.regret(near) > 0.0
    finally:
        del land.__dict__["truth"]


def test_a_rung_charges_its_warm_up_and_the_steps_it_counts(land):
    measurement = Measurement(min_steps=3, max_steps=4, target_seconds=0.0)
    bench = ReplayBench(land, seed=0, measurement=measurement)
    family = land.families[0]
    launch = bench.open(family, family.ladder)
    assert bench.spent_s == READY_S
    record = launch.measure(family.ladder[0])
    assert record is not None and record.step_s is not None
    assert bench.spent_s == pytest.approx(READY_S + 5 * record.step_s), "2 warm-up and 3 counted"
    recorded = [row.step_times_s[0] for row in land.rows[record.plan_id]]
    assert record.step_s in recorded and len(record.step_times_s) == 3
    assert record.tokens_per_s == pytest.approx(STEP_TOKENS / record.step_s)
    with pytest.raises(AssertionError):
        launch.measure(family.ladder[0])


def test_a_launch_stays_in_its_round_and_a_failure_ends_it(land):
    family = next(f for f in land.families if f.ladder[0].plan.engine == "fsdp2")
    bench = ReplayBench(land, seed=1, measurement=Measurement())
    for _ in range(4):
        launch = bench.open(family, family.ladder)
        ratios = set()
        record = None
        for estimate in family.ladder:
            before = bench.spent_s
            record = launch.measure(estimate)
            assert record is not None
            if record.outcome is Outcome.OOM:
                assert bench.spent_s - before == FAILS_AFTER_S, "a failure costs its time, too"
                break
            ratios.add(round((record.step_s or 0) / estimate.time.step_s, 6))
        assert len(ratios) == 1 and not launch.alive
        assert record is not None and record.outcome is Outcome.OOM


def test_a_hopeless_rung_charges_two_steps(land):
    row = land.rows[land.best][0]
    step_s = row.step_times_s[0]
    assert len(counted_steps(row, Measurement(), 0.9 * step_s)) == 2
    assert len(counted_steps(row, Measurement(), 1.1 * step_s)) == 5


@pytest.mark.parametrize("sampler", ["cost-model", "tpe", "random", "deepspeed-autotuning"])
def test_a_replay_ends_with_an_answer_and_the_same_seed_gives_the_same(land, sampler):
    whole = replays.exhaustive_s(land)
    first = replays.replay(land, sampler, seed=3, until_s=whole)
    again = replays.replay(land, sampler, seed=3, until_s=whole)
    assert first == again
    assert 0 < first.spent_s and first.steps and first.records >= first.launches
    times = [step.spent_s for step in first.steps]
    assert times == sorted(times) and times[0] > READY_S


def test_the_area_is_the_mean_regret_over_time():
    steps = (
        replays.Step(spent_s=10.0, regret=0.4, gap=0.4),
        replays.Step(spent_s=20.0, regret=0.0, gap=0.1),
    )
    run = replays.Replayed(
        landscape="", sampler="", seed=0, steps=steps, spent_s=50.0, launches=1,
        most_launches_an_arm=1, records=2, because="",
    )  # fmt: skip
    assert run.area(100.0) == pytest.approx((10 * 1.0 + 10 * 0.4) / 100)
    assert run.area(15.0) == pytest.approx((10 * 1.0 + 5 * 0.4) / 15)
    assert [run.regret_at(t) for t in (0, 10, 15, 20, 999)] == [1.0, 0.4, 0.4, 0.0, 0.0]


def test_exhausting_and_launching_each_alone(land):
    arms = landscapes.exhaustive_arms(land)
    points = sum(len(arm) for arm in arms)
    whole, alone = replays.exhaustive_s(land), replays.one_launch_each_s(land, cold=False)
    cold = replays.one_launch_each_s(land, cold=True)
    rungs_s = sum(expected_rung_s(land, plan) for arm in arms for plan in arm)
    assert whole == pytest.approx(len(arms) * READY_S + rungs_s)
    assert alone - whole == pytest.approx((points - len(arms)) * READY_S)
    assert cold - alone == pytest.approx(points * (COLD_S - READY_S))


def expected_rung_s(land, plan) -> float:
    """Two steps of warm-up, then of the five what fills a second, at least three."""
    rows = land.rows[plan.id]
    if not rows[0].ran:
        return FAILS_AFTER_S
    steps = [row.step_times_s[0] for row in rows]
    return statistics.mean((2 + min(5, max(3, math.ceil(1 / step)))) * step for step in steps)
