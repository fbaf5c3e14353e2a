"""What is predicted of a rank that holds a part of every projection, and the plans of such."""

from dataclasses import replace

import numpy as np
import pytest

from autotune.memory import estimate_memory, estimate_memory_table, profiles
from autotune.plan import Engine, Plan, Recompute
from autotune.planner import enumerate_plans, rank_plans
from autotune.rules import check_plan
from autotune.search.space import family_name
from autotune.spec.hardware import load_hardware
from autotune.spec.model import load_model
from autotune.spec.model.part import tensor_part
from autotune.spec.strategy import load_strategies
from autotune.spec.workload import Workload
from autotune.tensor_rules import tensor_parallel_splits
from autotune.timing import estimate_time

MODEL = load_model("tiny-qwen3")
WORKLOAD = Workload(seq_len=1024, global_batch_size=16)
FOUR = load_hardware("h100-sxm", 4)
SPLIT = Plan(strategy="fsdp2", engine=Engine.FSDP2, dp_shard=2, tp=2, grad_accum_steps=8)


@pytest.fixture(autouse=True)
def closed_form(monkeypatch):
    """Trace nothing: these are the base install's numbers, whatever is installed."""
    monkeypatch.setattr(profiles, "can_trace", lambda: False)
    monkeypatch.setattr(profiles, "_from_cache", lambda model, digest, keys: {})
    monkeypatch.setattr(profiles, "_found", {})


@pytest.mark.parametrize("name", ["tiny-qwen3", "llama-3.1-8b", "qwen2.5-7b", "gemma-3-4b"])
@pytest.mark.parametrize("tp", [2, 4])
def test_the_parts_are_the_whole(name, tp):
    model = load_model(name)
    assert tensor_parallel_splits(replace(SPLIT, tp=tp), model, WORKLOAD) is None
    part = tensor_part(model, tp)
    norms = model.num_layers * (model.norms_per_layer * model.hidden_size)
    norms += model.num_layers * 2 * model.head_dim * (model.qk_norm != "none") + model.hidden_size
    assert tp * part.num_parameters - (tp - 1) * norms == model.num_parameters
    assert tensor_part(model, 1) is model
    assert tensor_part(model, tp, whole_vocabulary=True).vocab_size == model.vocab_size


def test_states_are_split_over_all_ranks():
    found = estimate_memory(MODEL, WORKLOAD, SPLIT, FOUR).components
    elements = tensor_part(MODEL, 2).num_parameters / 2
    assert found["parameters"] == pytest.approx(4 * elements, rel=1e-6)
    assert found["optimizer"] == pytest.approx(8 * elements, rel=1e-6)


def test_a_table_of_several_degrees_says_what_each_plan_alone_says():
    plans = [replace(SPLIT, dp_shard=4 // tp, tp=tp, micro_batch_size=batch,
                     grad_accum_steps=4 * tp // batch, recompute=mode)
             for tp in (1, 2) for batch in (1, 2) for mode in Recompute]  # fmt: skip
    assert not any(check_plan(plan, MODEL, WORKLOAD, FOUR) for plan in plans)
    table = estimate_memory_table(MODEL, WORKLOAD, plans, FOUR)
    alone = [estimate_memory(MODEL, WORKLOAD, plan, FOUR).total_bytes for plan in plans]
    np.testing.assert_allclose(table.total_bytes, alone, rtol=1e-6)
    assert set(table.columns.world_size) == {4.0}
    assert len({round(total) for total in table.total_bytes}) == len(plans)


def test_a_rank_needs_less_of_each_sequence():
    """The same micro batch: half the heads and features, but logits of all of the vocabulary."""
    whole = replace(SPLIT, dp_shard=2, tp=1, micro_batch_size=4, grad_accum_steps=2)
    two = load_hardware("h100-sxm", 2)
    one = estimate_memory(MODEL, WORKLOAD, whole, two)
    part = estimate_memory(MODEL, WORKLOAD, replace(whole, tp=2), FOUR)
    framework = one.components["framework"]
    assert framework == part.components["framework"]
    layers = (found.instants["backward"] - framework for found in (part, one))
    assert next(layers) < 0.75 * next(layers)
    assert part.peak_instant == one.peak_instant == "later_loss"
    assert part.components["logits"] == pytest.approx(one.components["logits"], rel=0.1)


def test_time_counts_the_sums():
    whole = replace(SPLIT, dp_shard=4, tp=1, grad_accum_steps=4)
    apart, split = (estimate_time(MODEL, WORKLOAD, plan, FOUR) for plan in (whole, SPLIT))
    assert split.num_ranks == apart.num_ranks == 4
    assert split.communication_s > apart.communication_s
    again = estimate_time(MODEL, WORKLOAD, replace(SPLIT, recompute=Recompute.FULL), FOUR)
    assert again.communication_s > split.communication_s
    # As many products over all ranks; each takes the loss of twice the sequences.
    assert apart.compute_s < split.compute_s < 2 * apart.compute_s


def test_degrees_are_in_the_space_where_they_are_asked_for():
    strategies = load_strategies(["fsdp2", "hsdp", "zero2"])
    assert {p.tp for p in enumerate_plans(MODEL, WORKLOAD, FOUR, strategies)} == {1}
    ranking = rank_plans(
        MODEL, WORKLOAD, FOUR, strategies, cp_degrees=[1, 2], tp_degrees=[1, 2],
        recompute=[Recompute.NONE], micro_batches=[1, 2],
    )  # fmt: skip
    split = [e.plan for e in ranking.candidates if e.plan.tp == 2]
    assert {(p.strategy, p.dp_shard, p.cp) for p in split} == {("fsdp2", 2, 1), ("fsdp2", 1, 2)}
    assert all(p.world_size == 4 for p in split)
    refused = {(r.plan.strategy, r.code) for r in ranking.rejected if r.plan.tp == 2}
    assert ("zero2", "AT115") in refused and ("hsdp", "AT107") in refused
    names = {family_name(plan) for plan in split}
    assert names == {"fsdp2 tp=2", "fsdp2 tp=2 cp=2"}
    assert split[0].describe().startswith("fsdp2 tp=2")


def test_a_plan_without_it_keeps_its_id():
    """Ids of committed records."""
    plan = Plan(strategy="zero2", engine=Engine.DEEPSPEED, zero_stage=2, dp_shard=4)
    assert plan.id == "51d24232887f"
    assert replace(SPLIT, tp=1, dp_shard=4).id != SPLIT.id
