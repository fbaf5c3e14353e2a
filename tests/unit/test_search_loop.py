"""The loop and its samplers on a bench that refuses what a launch cannot do.

`search` in `search_bench` asserts of every run here that what the sampler was told and what was
recorded are the very records that `measure` returned, in that order: none is made up.
"""

from __future__ import annotations

import pytest

pytest.importorskip("optuna")

from autotune.planner import Estimate
from autotune.search.book import Book
from autotune.search.loop import SPACE_SPENT
from autotune.search.names import SAMPLERS
from autotune.search.space import Family
from autotune.trial.protocol import Outcome
from autotune.trial.record import TrialRecord
from tests.unit.search_bench import MemoryStore, NoLimits, families_of, search


@pytest.fixture(scope="module")
def families():
    return families_of()


def as_predicted_of(record: TrialRecord, families: list[Family]) -> float:
    ladders = [e for family in families for e in family.ladder]
    return next(e.time.tokens_per_s for e in ladders if e.plan.id == record.plan_id)


def as_predicted(estimate: Estimate) -> float:
    return estimate.time.tokens_per_s


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "gp"])
def test_every_sampler_searches_and_nothing_is_told_that_was_not_measured(families, sampler):
    def rule(estimate: Estimate) -> float | Outcome:
        too_large = estimate.plan.micro_batch_size > 4 and estimate.plan.engine == "ddp"
        return Outcome.OOM if too_large else estimate.time.tokens_per_s

    bench, book, because = search(families, rule, sampler)
    assert bench.made and because
    assert all(not launch.open for launch in bench.launches)
    if sampler in ("tpe", "random", "grid"):
        assert because == SPACE_SPENT and not book.open_rungs()
        names = [launch.family.name for launch in bench.launches]
        assert len(names) == len(set(names)) == len(families), "one launch a family"


def test_gp_of_optuna_is_selectable(families):
    pytest.importorskip("torch")
    bench, _, because = search(families[:2], as_predicted, "gp")
    assert because == SPACE_SPENT and len(bench.launches) == 2


def test_a_bound_is_no_record(families):
    """What runs out of memory rules out what is above it, and nothing is written of that."""

    def rule(estimate: Estimate) -> float | Outcome:
        return Outcome.OOM if estimate.plan.micro_batch_size >= 4 else estimate.time.tokens_per_s

    for sampler in ("cost-model", "grid"):
        bench, book, _ = search(families, rule, sampler)
        for family in families:
            plans = {e.plan.id for e in family.ladder}
            own = [record for record in bench.made if record.plan_id in plans]
            for n, record in enumerate(own):
                if record.outcome is Outcome.OOM:
                    later = [r.plan_object.micro_batch_size for r in own[n + 1 :]]
                    assert all(size < record.plan_object.micro_batch_size for size in later)
            failed = [r.plan_object.micro_batch_size for r in own if r.outcome is Outcome.OOM]
            reachable = [e.plan.micro_batch_size for e in book.open_of(family)]
            assert not failed or all(size < min(failed) for size in reachable)
        assert any(record.outcome is Outcome.OOM for record in bench.made)


def test_a_crash_ends_its_family_alone(families):
    def rule(estimate: Estimate) -> float | Outcome:
        return Outcome.CRASHED if estimate.plan.strategy == "zero1" else estimate.time.tokens_per_s

    bench, book, because = search(families, rule, "grid")
    crashed = [family for family in families if family.ladder[0].plan.strategy == "zero1"]
    assert because == SPACE_SPENT
    assert all(not book.open_of(family) for family in crashed)
    assert sum(record.outcome is Outcome.CRASHED for record in bench.made) == len(crashed) > 0


def test_what_is_measured_first_is_among_the_best_predicted(families):
    bench, _, _ = search(families, as_predicted)
    best = max(e.time.tokens_per_s for f in families for e in f.ladder)
    assert as_predicted_of(bench.made[0], families) > 0.9 * best


def test_a_search_stops_when_nothing_left_may_beat_the_best(families):
    """One configuration far above all predictions: the rest cannot reach it."""
    best = max((e for f in families for e in f.ladder), key=lambda e: e.time.tokens_per_s)

    def rule(estimate: Estimate) -> float:
        others = 0.2 * estimate.time.tokens_per_s
        return 5 * estimate.time.tokens_per_s if estimate.plan.id == best.plan.id else others

    bench, book, because = search(families, rule)
    assert "(--tolerance)" in because and "2%" in because
    assert book.open_rungs(), "it stopped with rungs left"
    assert len(bench.made) < sum(len(family.ladder) for family in families)


def test_a_larger_tolerance_stops_no_later(families):
    def rule(estimate: Estimate) -> float:
        return estimate.time.tokens_per_s * (1 + len(estimate.plan.strategy) / 50)

    spent = [search(families, rule, tolerance=t)[0].spent_s for t in (0.0, 0.05, 0.5)]
    assert spent == sorted(spent, reverse=True) and spent[0] > spent[-1]


def test_it_finds_what_the_prediction_ranks_low(families):
    """The time model is wrong about every engine but one, by a factor it has to learn."""

    def rule(estimate: Estimate) -> float:
        slow = 0.4 if estimate.plan.engine != "fsdp2" else 1.0
        return slow * estimate.time.tokens_per_s

    bench, _, _ = search(families, rule)
    true_best = max((e for f in families for e in f.ladder), key=rule)
    found = max(bench.made, key=lambda record: record.tokens_per_s or 0)
    assert found.tokens_per_s >= 0.98 * rule(true_best)


def test_limits_end_a_search_between_rungs_and_launches(families):
    class TwoLaunches(NoLimits):
        def __init__(self) -> None:
            self.asked = 0

        def launches_spent(self, under_way: int) -> str | None:
            self.asked += 1
            return "enough launches" if len(opened()) >= 2 else None

    seen: list[object] = []

    def rule(estimate: Estimate) -> float:
        seen.append(estimate.plan.family_id)
        return estimate.time.tokens_per_s

    def opened() -> set[object]:
        return set(seen)

    bench, _, because = search(families, rule, "grid", limits=TwoLaunches())
    assert because == "enough launches" and len(bench.launches) == 2
    ladders = [len(launch.family.ladder) for launch in bench.launches]
    assert [len(launch.sizes) for launch in bench.launches] == ladders, "what is open is finished"


def test_deepspeeds_algorithm_goes_by_stage_and_ends_at_a_plateau(families):
    """ZeRO 0 to 3 in order, the published 5% rule, and nothing of what it does not know."""
    flat = search(families, lambda e: 100.0, "deepspeed-autotuning")
    rising = search(families, lambda e: 100.0 * e.plan.micro_batch_size, "deepspeed-autotuning")
    stages = [launch.family.name for launch in rising[0].launches]
    assert stages == ["ddp", "zero1", "zero2", "zero3"]
    assert "no further point" in rising[2]
    sizes = rising[0].launches[0].sizes
    assert sizes == [1, 4, 8], "the smallest, then the upper half"
    assert flat[0].launches[0].sizes == [1, 4], "no gain of 5% from 1 to 4"


def test_open_rungs_end_with_the_first_that_is_ruled_out(families):
    book = Book(families, MemoryStore(), None)
    assert set(book.open_rungs()) == {family.name for family in families}
    assert book.left_out() == []
