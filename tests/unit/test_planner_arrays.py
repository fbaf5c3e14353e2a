"""A space as arrays says what single plans do."""

from dataclasses import replace

import pytest

from autotune.memory import estimate_memory, estimate_memory_table
from autotune.memory.columns import PlanColumns
from autotune.memory.knowledge import model_key
from autotune.memory.residuals import Residuals, Row, Ruler, ruler_of
from autotune.memory.verdict import judge_table
from autotune.planner import enumerate_plans, estimate_plan, rank_plans
from autotune.rules import check_plan
from autotune.spec.hardware import load_hardware
from autotune.spec.model import load_model
from autotune.spec.strategy import load_strategies
from autotune.spec.workload import Lora, Workload
from autotune.units import GIB, MIB

MODEL, WORKLOAD, H100 = load_model("qwen3-8b"), Workload(), load_hardware("h100-sxm", 8)


def rank(hardware=H100, **values):
    return rank_plans(MODEL, WORKLOAD, hardware, load_strategies(), **values)


def spread_plans(model, workload, hardware):
    """Every legal plan of the space, at sizes of batch, accumulation and bucket of their own."""
    plans = enumerate_plans(model, workload, hardware, load_strategies())
    legal = [p for p in plans if not check_plan(p, model, workload, hardware)]
    return [replace(p, bucket_elements=(0, 10**7)[n % 2]) for n, p in enumerate(legal)]


@pytest.mark.parametrize("gpu", ["h100-sxm", "cpu"])
@pytest.mark.parametrize("adapter", [None, Lora()])
def test_arrays_say_what_single_plans_do(gpu, adapter):
    model = load_model("tiny-qwen3")
    workload = Workload(seq_len=512, global_batch_size=16, adapter=adapter)
    hardware = load_hardware(gpu, 4, 1600 * MIB)
    plans = spread_plans(model, workload, hardware)
    table = estimate_memory_table(model, workload, plans, hardware)
    known = [Row("zero2", "none", "m", 10**9, 0.1), Row("fsdp2", "full", "m", 10**8, -0.1)]
    residuals = Residuals.known(ruler_of(on_cpu=gpu == "cpu"), known)
    judged = judge_table(table, hardware, residuals, model_key(model))
    assert len(plans) > 100
    for position in range(0, len(plans), 7):
        single = estimate_plan(model, workload, plans[position], hardware, residuals)
        peak = judged.peak(position)
        assert table.columns.plan(position) == plans[position]
        # Components are rounded to bytes one by one.
        assert peak.total_bytes == pytest.approx(single.peak.total_bytes, abs=16)
        assert peak.host_bytes == pytest.approx(single.peak.host_bytes, abs=16)
        gathered = single.peak.gather_host_bytes
        assert peak.gather_host_bytes == pytest.approx(gathered, abs=16)
        assert (gathered > 0) == (gpu != "cpu")
        assert peak.framework_bytes == single.peak.framework_bytes
        assert table.peak_instants[table.peak_instant[position]] == single.memory.peak_instant
        chance = judged.fit_probability[position]
        assert chance == pytest.approx(single.fit_probability, abs=0.02)
        assert peak.residual.bias == pytest.approx(single.peak.residual.bias, abs=0.01)
        assert peak.residual.scale == pytest.approx(single.peak.residual.scale, rel=0.02)


def test_columns_hold_a_plan_and_give_it_back():
    plans = spread_plans(MODEL, WORKLOAD, H100)
    columns = PlanColumns.of(plans)
    assert [columns.plan(n) for n in range(len(columns))] == plans
    assert list(columns.world_size) == [plan.world_size for plan in plans]
    assert len(columns.layouts) < len(plans) / 3
    parts = [(layout, columns.numbers[columns.layout == n]) for n, layout in
             enumerate(columns.layouts)]  # fmt: skip
    joined = PlanColumns.joined(parts)
    assert {joined.plan(n).id for n in range(len(joined))} == {plan.id for plan in plans}
    grouped = sorted(int(n) for _, index in columns.groups() for n in index)
    assert grouped == list(range(len(plans)))


def test_components_are_made_for_the_plans_that_are_looked_at(monkeypatch):
    made = []

    def counted(*args, **values):
        made.append(args)
        return estimate_memory(*args, **values)

    monkeypatch.setattr("autotune.planner.estimate.estimate_memory", counted)
    ranking = rank()
    assert made == []
    best = ranking.candidates[0]
    assert best.memory.total_bytes == pytest.approx(best.peak.total_bytes, abs=16)
    assert best.memory.residual == best.peak.residual
    assert len(made) == 1


def test_what_runs_measured_moves_the_ranking():
    tight = load_hardware("h100-sxm", 8, 40 * GIB)
    key = model_key(MODEL)
    rows = [Row("zero3", mode, key, 30 * GIB, 0.4) for mode in ("none", "full")] * 4
    learned = rank(hardware=tight, residuals=Residuals.known(Ruler.CUDA, rows))
    before = {e.plan.id: e for e in rank(hardware=tight).candidates}
    moved = [e for e in learned.candidates if e.plan.zero_stage == 3]
    slack = 1e-3  # where a plan is far from the limit, a smaller spread says more than the bias
    assert all(e.fit_probability <= before[e.plan.id].fit_probability + slack for e in moved)
    assert any(e.verdict is not before[e.plan.id].verdict for e in moved)
    assert all(e.peak.total_bytes == before[e.plan.id].peak.total_bytes for e in moved)
    assert all(e.peak.expected_bytes > 1.2 * e.peak.total_bytes for e in moved)
