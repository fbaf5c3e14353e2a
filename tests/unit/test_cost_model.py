"""What `cost-model` asks for heeds what fits; what it believes heeds how sure a step is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest

optuna = pytest.importorskip("optuna")

from autotune.search.asker import Asker  # noqa: E402
from autotune.search.candidates import Candidates  # noqa: E402
from autotune.search.policy import Asked, Charge, Offer  # noqa: E402
from autotune.search.samplers import make_sampler  # noqa: E402
from autotune.search.space import Family  # noqa: E402
from autotune.trial.protocol import Outcome  # noqa: E402
from autotune.trial.record import TrialRecord  # noqa: E402
from tests.unit.search_bench import families_of  # noqa: E402


@pytest.fixture(scope="module")
def families() -> list[Family]:
    return families_of("ddp", "zero2", "fsdp2")


def asker_of(families: Sequence[Family]) -> Asker:
    named = make_sampler("cost-model", families, seed=0)
    return Asker(optuna.storages.InMemoryStorage(), families, named, seed=0)


def asked_first(families: Sequence[Family]) -> Asked:
    asked = asker_of(families).ask(Offer(rungs={f.name: f.ladder for f in families}))
    assert isinstance(asked, Asked)
    return asked


def test_what_hardly_fits_is_not_asked_first(families):
    named = asked_first(families).family.name

    def doubted(family: Family) -> Family:
        chance = 0.1 if family.name == named else 1.0
        ladder = tuple(replace(e, fit_probability=chance) for e in family.ladder)
        return replace(family, ladder=ladder)

    assert asked_first([doubted(family) for family in families]).family.name != named


def test_steps_that_differ_among_themselves_are_believed_less(families):
    """Twice as fast as predicted: by steps that agree, and by steps that do not."""
    estimate = families[0].ladder[0]
    place = Candidates.of(families).position[estimate.plan.id]
    step_s = estimate.time.step_s / 2
    means, sds = {}, {}
    for name, spread in (("agree", 0.0), ("differ", 0.9)):
        asker = asker_of(families)
        steps = [step_s * (1 + sign * spread) for sign in (-1, 0, 1)]
        record = TrialRecord(
            launch=1, plan_id=estimate.plan.id, plan=estimate.plan.to_dict(), outcome=Outcome.OK,
            message="", tokens_per_s=estimate.time.tokens_per_step / step_s, step_s=step_s,
            step_times_s=tuple(steps),
        )  # fmt: skip
        asker.tell(families[0], record, Charge(seconds=1.0, opened=True))
        belief = asker.study.sampler.belief(asker.study)
        means[name], sds[name] = belief.mean[place], belief.sd[place]
    measured = math.log(estimate.time.tokens_per_step / step_s)
    assert abs(means["agree"] - measured) < 0.05 < measured - means["differ"]
    assert sds["differ"] > 1.5 * sds["agree"]
