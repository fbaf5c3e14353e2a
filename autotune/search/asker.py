"""The Optuna side of a study: what to try next, and how each result is told."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from autotune.search.space import Family
from autotune.trial.protocol import Outcome
from autotune.trial.record import TrialRecord

JOURNAL_FILE = "study.journal"
_FAMILY = "family"
_MEMORY = "memory"
_PLAN_ID = "plan_id"
_ENQUEUED_FAMILIES = 3
"""The planner's best families are asked first; after them the sampler decides."""

_CONSTRAINED = {Outcome.OOM, Outcome.HOST_OOM, Outcome.THRASH}
"""Outcomes told as a broken constraint. Told as FAIL, samplers would ignore them and return."""


class Asker:
    """Asks Optuna for the next plan and tells it what every rung gave.

    An Optuna trial is one plan; one launch answers several of them.
    """

    def __init__(self, folder: Path, families: Sequence[Family], *, seed: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._families = {family.name: family for family in families}
        storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL_FILE)))
        self._study = optuna.create_study(
            study_name="autotune",
            storage=storage,
            direction="maximize",
            sampler=_sampler(seed),
            load_if_exists=True,
        )
        self._pending: optuna.Trial | None = None

    def recover(self, known: Sequence[TrialRecord]) -> int:
        """Close what a dead search left RUNNING, and ask it again; enqueue the planner's best.

        The journal keeps no heartbeat: a trial of a dead search would stay RUNNING for ever. What
        was recorded but never told, because the search died in between, is told now.

        Returns:
            The number of trials that were closed.
        """
        measured = {record.plan_id for record in known}
        told = {
            trial.user_attrs.get(_PLAN_ID)
            for trial in self._study.get_trials(deepcopy=False)
            if trial.state.is_finished()
        }
        for record in known:
            family = self._family_of(record)
            if record.plan_id not in told and family is not None:
                self._add(family, record)
        left = self._study.get_trials(deepcopy=False, states=[TrialState.RUNNING])
        for trial in left:
            self._study.tell(trial.number, state=TrialState.FAIL)
            if trial.params and not self._is_measured(trial.params, measured):
                self._study.enqueue_trial(trial.params)
        if not self._study.get_trials(deepcopy=False):
            for family in list(self._families.values())[:_ENQUEUED_FAMILIES]:
                self._study.enqueue_trial(
                    self._params(family, family.best_predicted.plan.micro_batch_size)
                )
        return len(left)

    def ask(self, untried: Sequence[Family]) -> Family:
        """Return the family to launch next, one of `untried`.

        The sampler may name a family that was measured already: its answer is known, so the trial
        is closed and the sampler asked again; after a few such asks the planner's order decides.
        """
        open_names = {family.name for family in untried}
        for _ in range(5):
            trial = self._study.ask()
            name = trial.suggest_categorical(_FAMILY, list(self._families))
            family = self._families[name]
            trial.suggest_categorical(*self._ladder_parameter(family))
            if name in open_names:
                self._pending = trial
                return family
            self._study.tell(trial, state=TrialState.FAIL)
        self._study.enqueue_trial(
            self._params(untried[0], untried[0].best_predicted.plan.micro_batch_size)
        )
        return self.ask(untried)

    def tell(self, family: Family, records: Sequence[TrialRecord]) -> None:
        """Tell every rung of a launch; the asked one closes the asked trial."""
        asked, self._pending = self._pending, None
        for record in records:
            name, _ = self._ladder_parameter(family)
            if asked is not None and asked.params.get(name) == record.plan_object.micro_batch_size:
                self._tell_asked(asked, record)
                asked = None
            else:
                self._add(family, record)
        if asked is not None:  # the ladder ended below the asked rung
            self._study.tell(asked, state=TrialState.FAIL)

    def _add(self, family: Family, record: TrialRecord) -> None:
        name, values = self._ladder_parameter(family)
        distributions: dict[str, BaseDistribution] = {
            _FAMILY: CategoricalDistribution(list(self._families)),
            name: CategoricalDistribution(values),
        }
        state = _state(record)
        self._study.add_trial(
            optuna.trial.create_trial(
                state=state,
                value=_value(record) if state is TrialState.COMPLETE else None,
                params=self._params(family, record.plan_object.micro_batch_size),
                distributions=distributions,
                user_attrs={_PLAN_ID: record.plan_id, "outcome": str(record.outcome)},
                constraints={_MEMORY: _constraint(record)},
            )
        )

    def _family_of(self, record: TrialRecord) -> Family | None:
        wanted = record.plan_object.family_id
        return next(
            (f for f in self._families.values() if f.ladder[0].plan.family_id == wanted), None
        )

    def _tell_asked(self, trial: optuna.Trial, record: TrialRecord) -> None:
        trial.set_user_attr(_PLAN_ID, record.plan_id)
        trial.set_user_attr("outcome", str(record.outcome))
        trial.set_constraint(_MEMORY, _constraint(record))
        if _state(record) is TrialState.COMPLETE:
            self._study.tell(trial, _value(record))
        else:
            self._study.tell(trial, state=TrialState.FAIL)

    def _params(self, family: Family, micro_batch_size: int) -> dict[str, str | int]:
        return {_FAMILY: family.name, self._ladder_parameter(family)[0]: micro_batch_size}

    def _ladder_parameter(self, family: Family) -> tuple[str, list[int]]:
        """Return the name and the values of a family's own micro-batch parameter."""
        values = [estimate.plan.micro_batch_size for estimate in family.ladder]
        return f"micro_batch_size of {family.name}", values

    def _is_measured(self, params: dict[str, object], measured: set[str]) -> bool:
        family = self._families.get(str(params.get(_FAMILY)))
        if family is None:
            return True  # not in this space any more
        size = params.get(self._ladder_parameter(family)[0])
        return isinstance(size, int) and family.rung(size).plan.id in measured


def _state(record: TrialRecord) -> TrialState:
    if record.outcome is Outcome.OK or record.outcome in _CONSTRAINED:
        return TrialState.COMPLETE
    return TrialState.FAIL


def _value(record: TrialRecord) -> float:
    """Return the objective: valid tokens/s; 0 for what does not fit, beside its constraint."""
    return record.tokens_per_s or 0.0


def _constraint(record: TrialRecord) -> float:
    """Return 1 where memory was not enough, -1 where it was (Optuna: above 0 is infeasible)."""
    return 1.0 if record.outcome in _CONSTRAINED else -1.0


def _sampler(seed: int) -> optuna.samplers.BaseSampler:
    with warnings.catch_warnings():
        # `multivariate` and `group` are marked experimental; families have parameters of their own.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True)
