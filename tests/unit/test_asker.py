"""What Optuna is asked and told; the journal is read back as a new search would."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

optuna = pytest.importorskip("optuna")

from optuna.storages import JournalStorage  # noqa: E402
from optuna.storages.journal import JournalFileBackend  # noqa: E402
from optuna.trial import TrialState  # noqa: E402

from autotune.planner import rank_plans  # noqa: E402
from autotune.search.asker import JOURNAL_FILE, Asker, journal_of  # noqa: E402
from autotune.search.policy import Charge, Offer, Stop  # noqa: E402
from autotune.search.samplers import make_sampler  # noqa: E402
from autotune.search.space import Family, make_families  # noqa: E402
from autotune.spec.hardware import load_hardware  # noqa: E402
from autotune.spec.model import load_model  # noqa: E402
from autotune.spec.strategy import load_strategies  # noqa: E402
from autotune.spec.workload import Workload  # noqa: E402
from autotune.trial.protocol import Outcome  # noqa: E402
from autotune.trial.record import TrialRecord  # noqa: E402


@pytest.fixture(scope="module")
def families() -> list[Family]:
    ranking = rank_plans(
        load_model("tiny-qwen3"), Workload(), load_hardware("cpu", 2), load_strategies()
    )
    return make_families(ranking.candidates)[0]


def records(family: Family, outcomes: Sequence[Outcome]) -> list[TrialRecord]:
    rows = []
    for estimate, outcome in zip(family.ladder, outcomes, strict=False):
        plan = estimate.plan
        rows.append(
            TrialRecord(
                launch=1, plan_id=plan.id, outcome=outcome, message="", plan=plan.to_dict(),
                tokens_per_s=100.0 * plan.micro_batch_size if outcome is Outcome.OK else None,
            )
        )  # fmt: skip
    return rows


def trials(folder: Path):
    storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL_FILE)))
    return optuna.load_study(study_name="autotune", storage=storage).get_trials()


def by_plan(folder: Path):
    told = [t for t in trials(folder) if "plan_id" in t.user_attrs and t.state.is_finished()]
    assert len({t.user_attrs["plan_id"] for t in told}) == len(told), "a plan is told once"
    return {t.user_attrs["plan_id"]: t for t in told}


def asker_of(folder: Path, families: Sequence[Family], *, seed: int = 0, sampler: str = "tpe"):
    named = make_sampler(sampler, families, seed=seed)
    return Asker(journal_of(folder), families, named, seed=seed)


def ask(asker: Asker, families: Sequence[Family]) -> Family:
    """Ask with every rung of the families open, and no launch under way."""
    asked = asker.ask(Offer(rungs={family.name: family.ladder for family in families}))
    assert not isinstance(asked, Stop)
    assert asked.planned[0] is asked.estimate and asked.estimate in asked.family.ladder
    return asked.family


def tell(asker: Asker, family: Family, rows: Sequence[TrialRecord]) -> None:
    for row in rows:
        asker.tell(family, row, Charge(seconds=1.0, opened=row is rows[0]))
    asker.abandon(family)


def test_the_planners_best_families_come_first(tmp_path, families):
    asker = asker_of(tmp_path, families, seed=0)
    asker.recover([])
    for want in families[:3]:
        assert ask(asker, families) is want
        tell(asker, want, records(want, [Outcome.OK] * 9))


def test_every_rung_is_told_and_memory_is_a_constraint_not_a_failure(tmp_path, families):
    asker = asker_of(tmp_path, families, seed=0)
    asker.recover([])
    family = ask(asker, families)
    rows = records(family, [Outcome.OK, Outcome.OK, Outcome.OOM])
    tell(asker, family, rows)
    told = by_plan(tmp_path)
    assert set(told) == {row.plan_id for row in rows}
    ok, _, oom = (told[row.plan_id] for row in rows)
    assert (ok.state, ok.value) == (TrialState.COMPLETE, rows[0].tokens_per_s)
    assert (oom.state, oom.value) == (TrialState.COMPLETE, 0.0)
    assert ok.constraints["memory"] < 0 < oom.constraints["memory"]
    assert all(t.state is not TrialState.RUNNING for t in trials(tmp_path))


def test_a_crash_is_a_failure(tmp_path, families):
    asker = asker_of(tmp_path, families, seed=0)
    asker.recover([])
    family = ask(asker, families)
    (row,) = records(family, [Outcome.CRASHED])
    tell(asker, family, [row])
    assert by_plan(tmp_path)[row.plan_id].state is TrialState.FAIL


def test_a_dead_searchs_trial_is_closed_and_asked_again(tmp_path, families):
    dead = asker_of(tmp_path, families, seed=0)
    dead.recover([])
    tell(dead, ask(dead, families), records(families[0], [Outcome.OK] * 9))
    asked = ask(dead, families[1:])  # and it dies here
    assert [t.state for t in trials(tmp_path)].count(TrialState.RUNNING) == 1
    again = asker_of(tmp_path, families, seed=0)
    assert again.recover(records(families[0], [Outcome.OK] * 9)) == 1
    assert TrialState.RUNNING not in [t.state for t in trials(tmp_path)]
    waiting = [t for t in trials(tmp_path) if t.state is TrialState.WAITING]
    assert waiting[-1].system_attrs["fixed_params"]["family"] == asked.name


def test_what_a_dead_search_recorded_but_never_told_is_told_once(tmp_path, families):
    dead = asker_of(tmp_path, families, seed=0)
    dead.recover([])
    family = ask(dead, families)
    rows = records(family, [Outcome.OK, Outcome.OOM])
    for _ in range(2):
        asker_of(tmp_path, families, seed=0).recover(rows)
        assert set(by_plan(tmp_path)) == {row.plan_id for row in rows}


def test_every_family_is_asked_though_the_sampler_repeats_itself(tmp_path, families):
    few = families[:4]
    asker = asker_of(tmp_path, few, seed=3)
    asker.recover([])
    left = list(few)
    while left:
        family = ask(asker, left)
        assert family in left
        left.remove(family)
        tell(asker, family, records(family, [Outcome.OK] * 9))


def test_a_rung_may_end_early_once_it_is_surely_slower_than_the_best(tmp_path, families):
    """Not at once: launches of one plan differ by more than a few percent."""
    asker = asker_of(tmp_path, families, sampler="grid")
    offer = Offer(rungs={family.name: family.ladder for family in families})
    first = asker.ask(offer)
    assert not isinstance(first, Stop) and first.give_up_step_s is None
    rows = records(first.family, [Outcome.OK, Outcome.OK, Outcome.OOM])
    for row, step_s in zip(rows, (2.0, 3.0, None), strict=True):
        tell(asker, first.family, [replace(row, step_s=step_s)])
    second = asker.ask(offer)
    assert not isinstance(second, Stop) and second.give_up_step_s is not None
    assert 1.05 < second.give_up_step_s / 2.0 < 1.5
