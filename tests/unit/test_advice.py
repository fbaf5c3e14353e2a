"""Advice: legal single changes, and each frees what it says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autotune.memory import Verdict
from autotune.memory.advice import advise, legal_changes
from autotune.plan import Plan, Recompute
from autotune.planner import estimate_plan, make_plan, predict_memory
from autotune.rules import check_plan
from autotune.spec.hardware import load_hardware
from autotune.spec.model import load_model
from autotune.spec.strategy import load_strategies
from autotune.spec.workload import Lora, Workload

MODEL, HARDWARE = load_model("qwen3-8b"), load_hardware("h100-sxm", 8)
WORKLOAD = Workload(seq_len=4096, global_batch_size=64)
STRATEGIES = {strategy.name: strategy for strategy in load_strategies()}


def plan(name: str, **values) -> Plan:
    cp = values.pop("cp", 1)
    laid_out = make_plan(STRATEGIES[name], HARDWARE, cp=cp, micro_batch_size=2)
    return replace(laid_out, grad_accum_steps=4 * cp, **values)


def advice_on(one: Plan, workload: Workload = WORKLOAD, hardware=HARDWARE):
    def estimate(other_workload, other):
        return predict_memory(MODEL, other_workload, other, hardware)

    changes = legal_changes(MODEL, workload, one, hardware)
    return advise(estimate(workload, one), changes, hardware, estimate)


@pytest.mark.parametrize("name", STRATEGIES)
def test_each_change_is_legal_and_frees_what_it_says(name):
    now = estimate_plan(MODEL, WORKLOAD, plan(name), HARDWARE)
    assert not now.violations
    found = advice_on(plan(name))
    assert found, "something always helps"
    for each in found:
        changed = each.change
        again = estimate_plan(MODEL, changed.workload, changed.plan, HARDWARE)
        assert again.violations == ()
        assert changed.plan.global_batch_size == WORKLOAD.global_batch_size
        assert each.freed_bytes == now.peak.expected_bytes - again.peak.expected_bytes > 0
        assert (each.verdict, each.fit_probability) == (again.verdict, again.fit_probability)
    freed = [each.freed_bytes for each in found]
    assert freed == sorted(freed, reverse=True)


def texts(*args, **values):
    return {change.text for change in legal_changes(MODEL, *args, HARDWARE, **values)}


def test_changes_are_the_next_steps_of_each_kind():
    assert texts(WORKLOAD, plan("zero2")) == {
        "recompute activations", "micro batch 1, accumulation 8", "micro batch 8, accumulation 1",
        "ZeRO-3",
        "offload the optimizer", "sequence parallel 2", "LoRA r=16",
    }  # fmt: skip
    assert texts(WORKLOAD, plan("ddp")) >= {"ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2"}
    assert texts(WORKLOAD, plan("fsdp2_no_reshard")) >= {
        "reshard after forward", "offload all states",
    }  # fmt: skip
    assert "ZeRO-3" in texts(WORKLOAD, plan("fsdp2"))
    assert "shard over all ranks" in texts(WORKLOAD, plan("hsdp"))
    assert "offload optimizer and parameters" in texts(WORKLOAD, plan("zero3"))


def test_what_is_done_already_or_breaks_a_rule_is_not_advised():
    done = plan("zero3_offload_params", recompute=Recompute.FULL, cp=8)
    lora = WORKLOAD.model_copy(update={"adapter": Lora(target_modules=tuple(MODEL.linears))})
    assert texts(lora, done) == {
        "micro batch 1, accumulation 64", "micro batch 64, accumulation 1",
    }, "cp=16 has too few heads"  # fmt: skip
    assert all(
        not check_plan(change.plan, MODEL, change.workload, HARDWARE)
        for change in legal_changes(MODEL, WORKLOAD, plan("zero1"), HARDWARE)
    )


def test_a_changed_plan_bears_the_name_of_its_strategy():
    found = {c.text: c.plan.strategy for c in legal_changes(MODEL, WORKLOAD, plan("ddp"), HARDWARE)}
    assert found["ZeRO-3"] == "zero3" and found["FSDP2"] == "fsdp2"
    moved = legal_changes(MODEL, WORKLOAD, plan("zero3"), HARDWARE)
    names = {change.text: change.plan.strategy for change in moved}
    assert names["offload optimizer and parameters"] == "zero3_offload_params"


def test_the_verdict_is_that_of_the_change():
    tight = load_hardware("h100-sxm", 8, 64 * 2**30)
    found = {each.change.text: each for each in advice_on(plan("zero2"), hardware=tight)}
    assert estimate_plan(MODEL, WORKLOAD, plan("zero2"), tight).verdict is Verdict.OOM
    assert found["recompute activations"].verdict is Verdict.FITS
    assert found["ZeRO-3"].verdict is Verdict.OOM
