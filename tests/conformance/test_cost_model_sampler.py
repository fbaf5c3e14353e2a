"""Optuna's own conformance cases, on the sampler over spaces that are not the finite list.

There it samples as `RandomSampler` does, which is what these cases then check of it. The cases for
relative sampling of numbers do not apply: the finite list is sampled by relative sampling alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest

pytest.importorskip("optuna")

import optuna
from optuna.testing.pytest_samplers import BasicSamplerTestCase, SingleOnlySamplerTestCase

from autotune.plan import Recompute
from autotune.planner import rank_plans
from autotune.search.cost_model import CostModelSampler
from autotune.search.parameters import FAMILY, distributions, size_in
from autotune.search.space import Family, make_families
from autotune.spec.hardware import load_hardware
from autotune.spec.model import load_model
from autotune.spec.strategy import load_strategies
from autotune.spec.workload import Workload

# Optuna calls its own conformance cases an experiment.
pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


@functools.cache
def families() -> list[Family]:
    ranking = rank_plans(
        load_model("tiny-qwen3"),
        Workload(seq_len=256, global_batch_size=8),
        load_hardware("cpu", 2),
        load_strategies(["ddp", "zero2", "fsdp2"]),
        cp_degrees=[1],
        recompute=[Recompute.NONE, Recompute.FULL],
    )
    return make_families(ranking.candidates)[0]


class TestWithoutAFiniteSpace(BasicSamplerTestCase, SingleOnlySamplerTestCase):
    @pytest.fixture
    def sampler(self) -> Callable[[], optuna.samplers.BaseSampler]:
        return lambda: CostModelSampler(seed=1)


class TestInAForeignStudy(BasicSamplerTestCase, SingleOnlySamplerTestCase):
    """It knows a finite space, and the study asks for other parameters."""

    @pytest.fixture
    def sampler(self) -> Callable[[], optuna.samplers.BaseSampler]:
        known = families()
        return lambda: CostModelSampler(known, seed=1)


def test_the_finite_space_is_sampled_in_an_ordinary_study_without_the_loop() -> None:
    """`study.optimize` with nothing of ours but the sampler: every point once, each a legal one."""
    known = families()
    by_name = {family.name: family for family in known}
    space = distributions(known)
    asked = []

    def objective(trial: optuna.Trial) -> float:
        family = by_name[trial.suggest_categorical(FAMILY, list(by_name))]
        name = f"micro_batch_size of {family.name}"
        trial.suggest_categorical(name, space[name].choices)
        size = size_in(trial.params, family)
        assert size is not None
        estimate = family.rung(size)
        asked.append(estimate.plan.id)
        trial.set_user_attr("plan_id", estimate.plan.id)
        trial.set_user_attr("outcome", "ok")
        return estimate.time.tokens_per_s

    study = optuna.create_study(direction="maximize", sampler=CostModelSampler(known))
    study.optimize(objective, n_trials=6)
    assert len(set(asked)) == 6
    best = max((e for f in known for e in f.ladder), key=lambda e: e.time.tokens_per_s)
    assert asked[0] == best.plan.id, "the best predicted comes first"
