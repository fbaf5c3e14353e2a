"""Finished trials change what is said of the plans that remain, and of the next study's."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autotune.memory import Verdict, residuals
from autotune.memory.fingerprint import machine_fingerprint
from autotune.memory.knowledge import KnowledgeBase
from autotune.memory.residuals import Spread
from autotune.plan import Recompute
from autotune.planner import rank_plans
from autotune.search.learning import Learner, by_family
from autotune.search.space import SURE_OOM, Family, hopeful, make_families, space_of
from autotune.spec.hardware import load_hardware
from autotune.spec.model import load_model
from autotune.spec.strategy import load_strategies
from autotune.spec.workload import Workload
from autotune.trial.protocol import Outcome
from autotune.trial.record import TrialRecord
from autotune.units import MIB

MODEL, WORKLOAD = load_model("tiny-qwen3"), Workload(seq_len=512, global_batch_size=16)
LIMIT = 480 * MIB


SPREAD = Spread(
    shared=0.1, library=0.05, group=0.05, model=0.05, machine=0.05, fixed=0.0,
    machine_fixed=0.0, noise=0.05, fixed_bytes=0, degrees=4,
)  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    """The committed records change with the formulas; these tests do not."""
    monkeypatch.setattr(residuals, "_committed", lambda ruler: (SPREAD, "test", ()))
    residuals._of_records.cache_clear()
    yield
    residuals._of_records.cache_clear()


def families() -> list[Family]:
    ranking = rank_plans(
        MODEL, WORKLOAD, load_hardware("cpu", 2, LIMIT), load_strategies(["zero2", "fsdp2"]),
        cp_degrees=[1], recompute=[Recompute.NONE],
    )  # fmt: skip
    return [
        Family(
            name=name,
            ladder=tuple(
                sorted(
                    (e for e in ranking.candidates if e.plan.strategy == name),
                    key=lambda e: e.plan.micro_batch_size,
                )
            ),
        )
        for name in ("zero2", "fsdp2")
    ]


def learner(base: KnowledgeBase | None = None) -> Learner:
    return Learner(
        MODEL, WORKLOAD, load_hardware("cpu", 2, LIMIT), machine_fingerprint("cpu"), base
    )


def record(estimate, ratio: float | None, **values) -> TrialRecord:
    """Return a trial that took `ratio` of its prediction; None: it ran out of memory."""
    plan = estimate.plan
    return TrialRecord(
        **{
            "launch": 1, "plan_id": plan.id, "plan": plan.to_dict(), "message": "",
            "outcome": Outcome.OOM if ratio is None else Outcome.OK,
            "peak_reserved_bytes": ratio and round(ratio * estimate.memory.total_bytes),
            "measured_accum_steps": (1, 4),
        } | values
    )  # fmt: skip


def test_what_two_rungs_took_moves_the_verdict_of_the_third():
    zero2, fsdp2 = families()
    edge = zero2.ladder[-1]
    assert edge.verdict is not Verdict.FITS
    index = len(zero2.ladder) - 1
    ratio = 0.8  # and so it fits
    learned = learner()
    learned.learn(zero2, [record(e, ratio) for e in zero2.ladder[:index]])
    now = learned.judged(zero2).ladder[index]
    assert now.fit_probability > edge.fit_probability + 0.4
    assert now.memory.residual.count >= index
    assert now.memory.total_bytes == edge.memory.total_bytes, "the formulas stay as they are"
    assert now.memory.expected_bytes == pytest.approx(0.8 * edge.peak.total_bytes, rel=0.07)
    other = learned.judged(fsdp2).ladder[index].memory.residual
    assert 0 > other.bias > now.memory.residual.bias, "another engine's is moved less"


def test_running_out_makes_the_rest_less_likely():
    zero2, fsdp2 = families()
    before = [e.fit_probability for e in fsdp2.ladder]
    learned = learner()
    learned.learn(zero2, [record(zero2.ladder[0], None)])
    after = [e.fit_probability for e in learned.judged(fsdp2).ladder]
    assert all(b >= a for b, a in zip(before, after, strict=True))
    assert max(b - a for b, a in zip(before, after, strict=True)) > 0.05


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ({}, True),
        ({"outcome": Outcome.CRASHED}, False),
        ({"outcome": Outcome.HOST_OOM}, False),
        ({"outcome": Outcome.THRASH}, False),
        ({"peak_reserved_bytes": None}, False),
        ({"measured_accum_steps": (1,)}, False),
    ],
)
def test_only_a_plans_own_peak_counts(tmp_path, values, kept):
    zero2, _ = families()
    assert zero2.ladder[0].plan.grad_accum_steps > 1
    base = KnowledgeBase(tmp_path)
    learner(base).learn(zero2, [record(zero2.ladder[0], 1.2, **values)])
    assert len(base.entries()) == kept


def test_the_next_study_starts_with_what_this_one_measured(tmp_path):
    zero2, _ = families()
    base = KnowledgeBase(tmp_path)
    first = learner(base)
    records = [record(e, 1.3) for e in zero2.ladder[:3]]
    first.learn(zero2, [*records, record(zero2.ladder[3], None)])
    second = learner(base).judged(zero2)
    assert second == first.judged(zero2)
    assert second.ladder[0].memory.residual.bias > 0.15
    assert [e.exceeded for e in base.entries()] == [False] * 3 + [True]
    first.learn(zero2, records)  # as when a study is resumed
    assert len(base.path.read_text().splitlines()) == 4, "nothing is written twice"


def test_records_are_handed_to_their_families():
    both = families()
    records = [record(both[1].ladder[0], 1.0), record(both[0].ladder[1], 1.0)]
    stranger = replace(records[0], plan_id="another")
    assert by_family(both, [*records, stranger]) == [
        (both[0], [records[1]]), (both[1], [records[0]]),
    ]  # fmt: skip


def test_a_resumed_study_keeps_its_space_whatever_is_known_by_now():
    ranking = rank_plans(
        load_model("qwen3-8b"), Workload(), load_hardware("a100-80gb", 8), load_strategies()
    )
    made, _ = make_families(ranking.candidates)
    kept = space_of(made)
    doubtful = [replace(e, fit_probability=1e-6) for e in reversed(ranking.candidates)]
    again, left_out = make_families(doubtful, kept)
    assert space_of(again) == kept and list(space_of(again)) == list(kept)
    total = sum(len(f.ladder) for f in again) + len(left_out)
    assert total == len(ranking.candidates)
    assert make_families(doubtful)[0] == []


def test_a_launch_is_not_paid_for_a_rung_without_a_chance():
    ladder = families()[0].ladder
    sure = [replace(e, fit_probability=1.0) for e in ladder]
    hopeless = [replace(e, fit_probability=SURE_OOM / 2) for e in ladder]
    assert hopeful([*sure[:2], *hopeless[2:]]) == [*sure[:2], hopeless[2]]
    assert hopeful(hopeless) == []
    assert hopeful(sure) == sure


def test_a_resumed_study_counts_its_own_trials_once(tmp_path):
    zero2, fsdp2 = families()
    base = KnowledgeBase(tmp_path)
    first = learner(base)
    records = [
        record(e, 1.3, step_s=2 * e.time.step_s, started_at=f"2026-01-0{n + 1}T00:00:00Z")
        for n, e in enumerate(zero2.ladder[:3])
    ]
    first.learn(zero2, records)
    assert learner(base).log_correction([zero2]), "another study starts with them"
    resumed = Learner(
        MODEL, WORKLOAD, load_hardware("cpu", 2, LIMIT), machine_fingerprint("cpu"), base, None,
        records,
    )  # fmt: skip
    assert resumed.log_correction([zero2]) == first.log_correction([zero2]) == {}
    resumed.learn(zero2, records)
    assert resumed.judged(fsdp2) == first.judged(fsdp2)
