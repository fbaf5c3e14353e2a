"""The Optuna side of a study: what to try next, and how each result is told."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from autotune.planner import Estimate
from autotune.search.parameters import (
    FAMILY,
    distributions,
    ladder_parameter,
    micro_batches,
    params_of,
    size_in,
)
from autotune.search.policy import Asked, Charge, Offer, Stop
from autotune.search.samplers import EndsItself, NamedSampler, TakesOffers
from autotune.search.space import Family
from autotune.search.told import (
    MEMORY,
    PLAN_ID,
    attributes_of,
    constraint_of,
    state_of,
    value_of,
)
from autotune.trial.protocol import Outcome
from autotune.trial.record import TrialRecord

JOURNAL_FILE = "study.journal"
_HOPELESS = 1.15
"""A rung surely slower than this many times the best step is not measured to its end."""
_ASKS = 5
"""How often a sampler may name a family that is measured already before one is drawn for it."""


def journal_of(folder: Path) -> BaseStorage:
    """Return the storage of a study's folder."""
    return JournalStorage(JournalFileBackend(str(folder / JOURNAL_FILE)))


class Asker:
    """A policy that asks Optuna for the next plan and tells it what every rung gave.

    An Optuna trial is one plan. A sampler that goes rung by rung is asked before each; for the
    others a launch measures the whole rest of the ladder they name a rung of.
    """

    def __init__(
        self, storage: BaseStorage, families: Sequence[Family], named: NamedSampler, *, seed: int
    ) -> None:
        self._families = {family.name: family for family in families}
        self._named = named
        self._draw = random.Random(seed)
        self._study = optuna.create_study(
            study_name="autotune",
            storage=storage,
            direction="maximize",
            sampler=named.sampler,
            load_if_exists=True,
        )
        self._pending: dict[str, optuna.Trial] = {}
        """Asked and not told, by family; a family is measured by one launch at a time."""
        self._best_step_s: float | None = None

    @property
    def study(self) -> optuna.Study:
        """Optuna's."""
        return self._study

    def recover(self, known: Sequence[TrialRecord]) -> int:
        """Close what a dead search left RUNNING, and ask it again; enqueue the planner's best.

        The journal keeps no heartbeat: a trial of a dead search would stay RUNNING for ever. What
        was recorded but never told, because the search died in between, is told now.

        Returns:
            The number of trials that were closed.
        """
        measured = {record.plan_id for record in known}
        for record in known:
            self._note_step(record)
        told = {
            trial.user_attrs.get(PLAN_ID)
            for trial in self._study.get_trials(deepcopy=False)
            if trial.state.is_finished()
        }
        for record in known:
            family = self._family_of(record)
            if record.plan_id not in told and family is not None:
                self._add(family, record, None)
        left = self._study.get_trials(deepcopy=False, states=[TrialState.RUNNING])
        for trial in left:
            self._study.tell(trial.number, state=TrialState.FAIL)
            if trial.params and not self._is_measured(trial.params, measured):
                self._enqueue(trial.params)
        if not self._study.get_trials(deepcopy=False):
            for family in list(self._families.values())[: self._named.first_families]:
                self._enqueue(params_of(family, family.best_predicted.plan.micro_batch_size))
        return len(left)

    def ask(self, offer: Offer) -> Asked | Stop:
        """Return the next rung; see `autotune.search.policy.Policy`.

        The sampler may name what was measured already: its answer is known, so the trial is closed
        and the sampler asked again; after a few such asks a family is drawn at random.
        """
        sampler = self._named.sampler
        if isinstance(sampler, TakesOffers):
            sampler.offer(offer)
        if isinstance(sampler, EndsItself) and (because := sampler.finished(self._study)):
            return Stop(because=because)
        reachable = offer.reachable()
        if not self._named.rung_by_rung and offer.running is not None and reachable:
            return self._asked(self._families[offer.running], reachable)
        for _ in range(_ASKS):
            trial = self._study.ask()
            family = self._families[trial.suggest_categorical(FAMILY, list(self._families))]
            size = trial.suggest_categorical(
                ladder_parameter(family), micro_batches(family).choices
            )
            rungs = list(offer.rungs.get(family.name, ()))
            if self._named.rung_by_rung:
                rungs = [rung for rung in rungs if rung.plan.micro_batch_size >= size]
                rungs = rungs if rungs and rungs[0].plan.micro_batch_size == size else []
            if rungs:
                self.abandon(family)
                self._pending[family.name] = trial
                return self._asked(family, rungs)
            self._study.tell(trial, state=TrialState.FAIL)
        name = self._draw.choice(list(offer.rungs))
        return self._asked(self._families[name], list(offer.rungs[name]))

    def tell(self, family: Family, record: TrialRecord, charge: Charge) -> None:
        """Tell a rung; the asked one closes the asked trial."""
        self._note_step(record)
        asked = self._pending.get(family.name)
        size = record.plan_object.micro_batch_size
        if asked is not None and size_in(asked.params, family) == size:
            del self._pending[family.name]
            self._tell_asked(asked, record, charge)
        else:
            self._add(family, record, charge)

    def abandon(self, family: Family) -> None:
        """Close a family's asked trial: the ladder ended below the asked rung."""
        asked = self._pending.pop(family.name, None)
        if asked is not None:
            self._study.tell(asked, state=TrialState.FAIL)

    def _asked(self, family: Family, rungs: Sequence[Estimate]) -> Asked:
        planned = rungs[:1] if self._named.rung_by_rung else rungs
        best = self._best_step_s
        return Asked(
            family=family,
            estimate=rungs[0],
            planned=tuple(planned),
            give_up_step_s=None if best is None else _HOPELESS * best,
        )

    def _note_step(self, record: TrialRecord) -> None:
        """Keep the fastest step; all plans of a study have the same tokens in one."""
        if record.outcome is Outcome.OK and record.step_s:
            self._best_step_s = min(record.step_s, self._best_step_s or record.step_s)

    def _add(self, family: Family, record: TrialRecord, charge: Charge | None) -> None:
        space = distributions([family]) | {
            FAMILY: optuna.distributions.CategoricalDistribution(list(self._families))
        }
        state = state_of(record)
        self._study.add_trial(
            optuna.trial.create_trial(
                state=state,
                value=value_of(record) if state is TrialState.COMPLETE else None,
                params=params_of(family, record.plan_object.micro_batch_size),
                distributions=space,
                user_attrs=attributes_of(record, charge),
                constraints={MEMORY: constraint_of(record)},
            )
        )

    def _tell_asked(self, trial: optuna.Trial, record: TrialRecord, charge: Charge) -> None:
        for name, value in attributes_of(record, charge).items():
            trial.set_user_attr(name, value)
        trial.set_constraint(MEMORY, constraint_of(record))
        if state_of(record) is TrialState.COMPLETE:
            self._study.tell(trial, value_of(record))
        else:
            self._study.tell(trial, state=TrialState.FAIL)

    def _enqueue(self, params: Mapping[str, Any]) -> None:
        # A sampler that goes rung by rung would ask for it again by itself, or for better.
        if not self._named.rung_by_rung:
            self._study.enqueue_trial(dict(params))

    def _family_of(self, record: TrialRecord) -> Family | None:
        wanted = record.plan_object.family_id
        return next(
            (f for f in self._families.values() if f.ladder[0].plan.family_id == wanted), None
        )

    def _is_measured(self, params: Mapping[str, Any], measured: set[str]) -> bool:
        family = self._families.get(str(params.get(FAMILY)))
        if family is None:
            return True  # not in this space any more
        size = size_in(params, family)
        return size is not None and family.rung(size).plan.id in measured
