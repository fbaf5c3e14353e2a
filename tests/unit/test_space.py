"""Candidates become families: what one launch can measure."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from autotune.plan import CpBackend, Recompute
from autotune.planner import Estimate, rank_plans
from autotune.search.space import SURE_OOM, family_name, make_families
from autotune.spec.hardware import load_hardware
from autotune.spec.model import load_model
from autotune.spec.strategy import load_strategies
from autotune.spec.workload import Workload


@pytest.fixture(scope="module")
def candidates() -> list[Estimate]:
    """A space with plans that fit, plans at risk and plans without a chance."""
    ranking = rank_plans(
        load_model("qwen3-8b"), Workload(), load_hardware("a100-80gb", 8), load_strategies()
    )
    chances = [e.fit_probability for e in ranking.candidates]
    assert min(chances) < SURE_OOM < 0.99 < max(chances)
    return list(ranking.candidates)


def test_every_candidate_is_tried_or_left_out_with_a_reason_once(candidates):
    families, left_out = make_families(candidates)
    tried = [e.plan.id for family in families for e in family.ladder]
    counted = Counter(tried) + Counter(_id(entry) for entry in left_out)
    assert counted == Counter(e.plan.id for e in candidates)
    assert {entry["code"] for entry in left_out} == {"PREDICTED_OOM"}
    assert all("GiB" in entry["reason"] for entry in left_out)


def _id(entry) -> str:
    from autotune.plan import Plan

    return Plan.from_dict(entry["plan"]).id


def test_a_family_differs_in_micro_batch_and_accumulation_alone(candidates):
    families, _ = make_families(candidates)
    for family in families:
        layouts = {replace(e.plan, micro_batch_size=1, grad_accum_steps=1) for e in family.ladder}
        assert len(layouts) == 1
        sizes = [e.plan.micro_batch_size for e in family.ladder]
        assert sizes == sorted(set(sizes))
        assert {e.plan.global_batch_size for e in family.ladder} == {64}
    names = [family.name for family in families]
    assert len(names) == len(set(names))


def test_a_ladder_ends_at_the_first_rung_past_the_edge(candidates):
    families, _ = make_families(candidates)
    ends = 0
    for family in families:
        hopeless = [e.fit_probability < SURE_OOM for e in family.ladder]
        assert not hopeless[0] and not any(hopeless[:-1])
        ends += hopeless[-1]
        assert family.best_predicted.fit_probability >= SURE_OOM
    assert ends, "the prediction may be wrong: one rung past the edge is tried"


def test_families_come_in_the_order_of_their_best(candidates):
    families, _ = make_families(candidates)
    assert families[0].ladder[0].plan.family_id == candidates[0].plan.family_id


def test_nothing_hopeful_gives_no_family(candidates):
    hopeless = [e for e in candidates if e.fit_probability < SURE_OOM]
    by_family = {e.plan.family_id for e in candidates if e.fit_probability >= SURE_OOM}
    alone = [e for e in hopeless if e.plan.family_id not in by_family]
    families, left_out = make_families(alone)
    assert families == [] and len(left_out) == len(alone) > 0


def test_names_tell_families_apart(candidates):
    plan = candidates[0].plan
    assert family_name(replace(plan, strategy="zero2", cp=1, recompute=Recompute.NONE)) == "zero2"
    full = replace(plan, strategy="zero2", cp=2, recompute=Recompute.FULL)
    assert family_name(full) == "zero2 cp=2 recompute"
    ring = replace(full, cp_backend=CpBackend.RING)
    assert family_name(replace(ring, heads_k_stride=2)) != family_name(ring)
