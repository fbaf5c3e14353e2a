"""What is measured next, by what it may gain and what it costs."""

from __future__ import annotations

import math

import numpy as np
import pytest

from autotune.search.acquisition import Options, can_still_win, expected_improvement, next_rung
from autotune.search.candidates import Candidates
from autotune.search.costs import Costs, planned_rung_s
from autotune.search.gaussian_process import (
    LAUNCH_NOISE,
    Belief,
    Observations,
    Scales,
    believe,
    covariance,
)
from autotune.trial.protocol import Measurement

pytest.importorskip("optuna")

from tests.unit.search_bench import families_of


@pytest.fixture(scope="module")
def candidates() -> Candidates:
    return Candidates.of(families_of())


def options(num: int, **changes: object) -> Options:
    values: dict[str, object] = {
        "open": np.ones(num, dtype=bool),
        "running": np.zeros(num, dtype=bool),
        "fit": np.ones(num),
        "family": np.arange(num),
        "rung_s": np.ones(num),
        "launch_s": 10.0,
    }
    return Options(**(values | changes))  # type: ignore[arg-type]


def belief(mean: list[float], sd: list[float]) -> Belief:
    return Belief(mean=np.array(mean), sd=np.array(sd), weights=np.ones(1))


def choose(given: Options, believed: Belief, best: float | None) -> int:
    return next_rung(given, believed, best, can_still_win(given, believed, best, 0.02))


def test_of_equals_the_rung_of_the_running_launch_is_taken():
    running = np.array([False, True])
    assert choose(options(2, running=running), belief([0.1, 0.1], [0.1, 0.1]), 0.0) == 1
    assert choose(options(2, running=~running), belief([0.1, 0.1], [0.1, 0.1]), 0.0) == 0


def test_without_an_answer_the_fastest_comes_first_where_all_fit():
    assert choose(options(3), belief([0.1, 0.3, 0.2], [0.1] * 3), None) == 1


def test_without_an_answer_a_safe_rung_comes_before_a_faster_one_that_may_not_fit():
    faster = belief([0.0, math.log(1.2)], [0.1, 0.1])
    assert choose(options(2, fit=np.array([0.9, 0.6])), faster, None) == 0
    assert choose(options(2, fit=np.array([0.9, 0.85])), faster, None) == 1


def test_without_an_answer_an_early_one_is_worth_more():
    slower = options(2, rung_s=np.array([1.0, 6.0]))
    assert choose(slower, belief([0.0, 0.1], [0.1, 0.1]), None) == 0
    assert choose(slower, belief([0.0, 0.5], [0.1, 0.1]), None) == 1


def test_another_family_is_launched_where_it_gains_more_than_it_costs():
    running = np.array([False, True])
    cheap = options(2, running=running, launch_s=0.5)
    assert choose(cheap, belief([0.5, 0.0], [0.1, 0.1]), 0.1) == 0
    dear = options(2, running=running, launch_s=1e4)
    assert choose(dear, belief([0.5, 0.0], [0.1, 0.1]), 0.1) == 1


def test_a_rung_that_hardly_fits_gains_little():
    fit = np.array([0.06, 1.0])
    assert choose(options(2, fit=fit), belief([0.3, 0.2], [0.1, 0.1]), 0.0) == 1


def test_a_launch_begins_with_the_lowest_rung_worth_its_while():
    """Two good rungs of one family: from the upper one the launch could not go down."""
    family = np.array([0, 0, 0])
    given = options(3, family=family)
    assert choose(given, belief([-3.0, 0.2, 0.21], [0.05, 0.1, 0.1]), 0.0) == 1


def test_nothing_is_hopeful_below_the_best_plus_the_tolerance():
    best = math.log(100.0)
    believed = belief([math.log(101), math.log(103)], [1e-6, 1e-6])
    assert can_still_win(options(2), believed, best, 0.02).tolist() == [False, True]
    assert can_still_win(options(2), believed, best, 0.05).tolist() == [False, False]
    closed = options(2, open=np.array([True, False]))
    assert can_still_win(closed, believed, best, 0.02).tolist() == [False, False]


def test_expected_improvement_is_the_mean_of_what_lies_above():
    draws = np.random.default_rng(0).normal(0.1, 0.3, 200_000)
    expected = np.maximum(draws - 0.2, 0).mean()
    found = expected_improvement(belief([0.1], [0.3]), 0.2)[0]
    assert found == pytest.approx(expected, rel=0.02)


def observed(rungs: list[int], residual: list[float]) -> Observations:
    return Observations(
        rungs=np.array(rungs),
        residual=np.array(residual),
        noise=np.full(len(rungs), 0.005),
        launch=np.arange(len(rungs)),
    )


def test_the_covariance_is_one_and_its_diagonal_is_the_prior_variance(candidates):
    every = np.arange(len(candidates))
    matrix = covariance(candidates, every, every, Scales())
    assert np.allclose(matrix, matrix.T)
    assert np.linalg.eigvalsh(matrix).min() > 0
    middle = believe(candidates, observed([], []), (Scales(),))
    assert np.allclose(middle.sd**2, np.diag(matrix))
    assert np.array_equal(middle.mean, candidates.log_rate)


def test_a_measured_plan_teaches_its_like_the_most(candidates):
    by_family = [family.name for family in candidates.families]
    zero2 = [n for n, f in enumerate(candidates.family) if by_family[f] == "zero2"]
    zero3 = [n for n, f in enumerate(candidates.family) if by_family[f] == "zero3"]
    ddp = [n for n, f in enumerate(candidates.family) if by_family[f] == "ddp"]
    seen = believe(candidates, observed([zero2[0]], [0.5]), (Scales(constant=0.1),))
    moved = seen.mean - candidates.log_rate
    assert moved[zero2[0]] == pytest.approx(0.5, abs=0.05)
    assert moved[zero2[0]] > moved[zero3[0]] > moved[ddp[0]] > 0
    assert seen.sd[zero2[0]] <= LAUNCH_NOISE < seen.sd[ddp[0]]


def test_the_likelihood_favours_small_scales_where_the_prediction_is_right(candidates):
    rungs = list(range(0, len(candidates), 2))
    right = believe(candidates, observed(rungs, [0.3] * len(rungs)))
    random = np.random.default_rng(1)
    wild = believe(candidates, observed(rungs, list(random.normal(0, 0.5, len(rungs)))))
    assert right.weights[0] > wild.weights[0] and right.weights[-1] < wild.weights[-1]
    assert right.sd.mean() < wild.sd.mean()


def test_costs_are_learned_from_what_was_charged(candidates):
    costs = Costs(first_launch_s=30.0)
    before = costs.rung_s(candidates, candidates.log_rate)
    assert costs.launch_s == 30.0
    costs.learn(8.0, 4.0, opened=False)
    assert costs.rung_s(candidates, candidates.log_rate) == pytest.approx(2 * before)
    costs.learn(20.0, 4.0, opened=True)
    assert costs.launch_s == pytest.approx(20.0 - 8.0)
    slower = costs.rung_s(candidates, candidates.log_rate - math.log(100))
    assert (slower > 2 * before).all()


def test_a_rung_costs_its_warm_up_and_counted_steps():
    measurement = Measurement(
        warmup_steps=1, min_steps=3, max_steps=10, target_seconds=4.0, max_direct_accumulation=4
    )
    seconds = planned_rung_s(
        measurement, np.array([2.0, 2.0, 0.1, 16.0]), np.array([1.0, 2.0, 1.0, 16.0])
    )
    alone = (1 + 3) * 2.0
    direct = (1 + 3) * 2.0
    short = (1 + 10) * 0.1
    composed = (1 + 3) * 2.0 + (1 + 4) * 1.0
    assert seconds.tolist() == pytest.approx([alone, direct, short, composed])
