"""`CostModelSampler`: Optuna's sampler over the finite space of a study.

The time model is the prior mean, a Gaussian process learns what it gets wrong, memory is a
constraint by its probability, and what a measurement costs divides what it may gain. Over any other
space it samples as Optuna's `RandomSampler` does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import optuna
from optuna.trial import FrozenTrial

from autotune.planner import Estimate
from autotune.search.acquisition import Flags, Options, can_still_win, next_rung
from autotune.search.candidates import Candidates
from autotune.search.costs import Costs, planned_rung_s
from autotune.search.finite_sampler import FiniteSampler
from autotune.search.gaussian_process import Belief, Observations, believe
from autotune.search.names import TOLERANCE
from autotune.search.policy import Offer
from autotune.search.space import Family
from autotune.search.told import (
    CHARGED_S,
    LAUNCH,
    OPENED,
    OUTCOME,
    PLAN_ID,
    SPREAD,
    STEP_S,
)
from autotune.trial.protocol import Measurement, Outcome

_LEAST_SPREAD = 0.005


@dataclass(slots=True)
class _State:
    belief: Belief
    best: float | None
    options: Options
    hopeful: Flags = field(default_factory=lambda: np.zeros(0, dtype=bool))


class CostModelSampler(FiniteSampler):
    """Asks for the rung with the largest expected improvement a second.

    Args:
        families: The finite space, best predicted first; none for a space of Optuna's own.
        tolerance: See `autotune.search.names.TOLERANCE`.
        measurement: How long a rung measures, which gives its cost.
        log_correction: See `Candidates.of`.
        seed: Of the sampler other spaces fall back to; over the finite space nothing is drawn.
    """

    def __init__(
        self,
        families: Sequence[Family] = (),
        *,
        tolerance: float = TOLERANCE,
        measurement: Measurement | None = None,
        seed: int | None = None,
        log_correction: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(families, seed=seed)
        self._candidates = Candidates.of(families, log_correction) if families else None
        self._tolerance = tolerance
        self._measurement = measurement or Measurement()
        self._offer: Offer | None = None
        self._known: tuple[int, Offer | None, _State] | None = None

    def offer(self, offer: Offer) -> None:
        """Say what can be measured; without it, all that has no trial yet."""
        self._offer = offer

    def finished(self, study: optuna.Study) -> str | None:
        """Return why the search may stop; None while a configuration may still win."""
        if self._candidates is None:
            return None
        state = self._state(study)
        if state.best is None or state.hopeful.any():
            return None
        return (
            "no remaining configuration is likely to beat the best by more than "
            f"{self._tolerance:.0%} (--tolerance)"
        )

    def belief(self, study: optuna.Study) -> Belief:
        """Return what is believed of every candidate's log tokens/s by now."""
        return self._state(study).belief

    def next_point(self, study: optuna.Study) -> tuple[Family, int] | None:
        """Return the family and the micro batch to measure next."""
        candidates = self._candidates
        if candidates is None:
            return None
        state = self._state(study)
        wanted = state.hopeful if state.hopeful.any() else state.options.open
        if not wanted.any():
            return None
        chosen = next_rung(state.options, state.belief, state.best, wanted)
        family = candidates.families[int(candidates.family[chosen])]
        return family, candidates.estimates[chosen].plan.micro_batch_size

    def _state(self, study: optuna.Study) -> _State:
        candidates = self._candidates
        assert candidates is not None
        told = [
            (candidates.position[trial.user_attrs[PLAN_ID]], trial)
            for trial in study.get_trials(deepcopy=False)
            if trial.state.is_finished() and trial.user_attrs.get(PLAN_ID) in candidates.position
        ]
        if (
            self._known is not None
            and self._known[0] == len(told)
            and self._known[1] is self._offer
        ):
            return self._known[2]
        ran = [(n, trial) for n, trial in told if _ran(trial)]
        belief = believe(candidates, _observations(candidates, ran))
        best = max((float(belief.mean[n]) for n, _ in ran), default=None)
        options = self._options(candidates, belief, told)
        hopeful = can_still_win(options, belief, best, self._tolerance)
        state = _State(belief=belief, best=best, options=options, hopeful=hopeful)
        self._known = (len(told), self._offer, state)
        return state

    def _options(
        self, candidates: Candidates, belief: Belief, told: Sequence[tuple[int, FrozenTrial]]
    ) -> Options:
        is_open = np.zeros(len(candidates), dtype=bool)
        running = np.zeros(len(candidates), dtype=bool)
        fit = np.zeros(len(candidates))
        measured = {n for n, _ in told}
        offer = self._offer or _all_open(candidates, measured)
        for name, rungs in offer.rungs.items():
            for estimate in rungs:
                size = estimate.plan.micro_batch_size
                n = candidates.place[name, size]
                is_open[n], fit[n] = True, estimate.fit_probability
                running[n] = name == offer.running and size > offer.above
        costs = _learned(Costs(measurement=self._measurement), candidates, told)
        return Options(
            open=is_open,
            running=running,
            fit=fit,
            family=candidates.family,
            rung_s=costs.rung_s(candidates, belief.mean),
            launch_s=costs.launch_s,
        )


def _all_open(candidates: Candidates, measured: set[int]) -> Offer:
    """Return an offer of everything that has no trial, for a study without the search's loop."""
    rungs: dict[str, list[Estimate]] = {}
    for n, estimate in enumerate(candidates.estimates):
        if n not in measured:
            rungs.setdefault(candidates.families[candidates.family[n]].name, []).append(estimate)
    return Offer(rungs=rungs)


def _ran(trial: FrozenTrial) -> bool:
    """Tell whether it ran within its memory: what thrashed is no candidate for the best."""
    return trial.user_attrs.get(OUTCOME) == Outcome.OK and bool(trial.value)


def _observations(candidates: Candidates, ran: Sequence[tuple[int, FrozenTrial]]) -> Observations:
    rungs = np.array([n for n, _ in ran], dtype=np.int64)
    rates = np.array([math.log(_rate(candidates, n, trial)) for n, trial in ran])
    spread = [float(trial.user_attrs.get(SPREAD) or 0.0) for _, trial in ran]
    return Observations(
        rungs=rungs,
        residual=rates - candidates.log_rate[rungs],
        noise=np.maximum(np.array(spread), _LEAST_SPREAD),
        launch=np.array([trial.user_attrs.get(LAUNCH, -1) for _, trial in ran], dtype=np.int64),
    )


def _rate(candidates: Candidates, n: int, trial: FrozenTrial) -> float:
    """Return the tokens/s of a trial as predictions count them: all tokens of a step."""
    step_s = trial.user_attrs.get(STEP_S)
    if step_s:
        return float(candidates.estimates[n].time.tokens_per_step / step_s)
    return float(trial.value or 1.0)


def _learned(
    costs: Costs, candidates: Candidates, told: Sequence[tuple[int, FrozenTrial]]
) -> Costs:
    """Take in what the told trials were charged; a failed one's rung had no measured step."""
    for n, trial in told:
        charged = trial.user_attrs.get(CHARGED_S)
        if charged is None or not _ran(trial):
            continue
        estimate = candidates.estimates[n]
        step_s = np.array([estimate.time.tokens_per_step / _rate(candidates, n, trial)])
        accumulation = np.array([float(estimate.plan.grad_accum_steps)])
        planned = planned_rung_s(costs.measurement, step_s, accumulation)
        costs.learn(float(charged), float(planned[0]), opened=bool(trial.user_attrs.get(OPENED)))
    return costs
