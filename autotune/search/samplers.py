"""The samplers a search can use, by name."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import optuna

from autotune.errors import AutotuneError
from autotune.search.cost_model import CostModelSampler
from autotune.search.deepspeed_tuning import DeepSpeedAutotuningSampler
from autotune.search.list_samplers import ListSampler
from autotune.search.names import SAMPLERS, TOLERANCE
from autotune.search.policy import Offer
from autotune.search.space import Family
from autotune.trial.protocol import Measurement


@runtime_checkable
class TakesOffers(Protocol):
    """A sampler that is told what can be measured, and names only that."""

    def offer(self, offer: Offer) -> None: ...  # noqa: D102


@runtime_checkable
class EndsItself(Protocol):
    """A sampler that knows when nothing more is worth measuring."""

    def finished(self, study: optuna.Study) -> str | None: ...  # noqa: D102


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedSampler:
    """A sampler, and how the search uses it."""

    name: str
    sampler: optuna.samplers.BaseSampler
    rung_by_rung: bool = False
    """Asked before every rung; otherwise a launch measures the whole rest of its ladder."""
    first_families: int = 0
    """How many of the planner's best families are measured before it is asked."""


def make_sampler(
    name: str,
    families: Sequence[Family],
    *,
    seed: int,
    tolerance: float = TOLERANCE,
    measurement: Measurement | None = None,
    log_correction: Mapping[str, float] | None = None,
) -> NamedSampler:
    """Return a sampler over the space.

    Args:
        name: One of `autotune.search.names.SAMPLERS`.
        families: The finite space, best predicted first.
        seed: Of what is drawn.
        tolerance: Of `cost-model`.
        measurement: How long a rung measures, for `cost-model`'s costs.
        log_correction: By plan id, for `cost-model`; see `Candidates.of`.

    Raises:
        AutotuneError: an unknown name.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    match name:
        case "cost-model":
            sampler = CostModelSampler(
                families,
                tolerance=tolerance,
                measurement=measurement,
                seed=seed,
                log_correction=log_correction,
            )
            return NamedSampler(name=name, sampler=sampler, rung_by_rung=True)
        case "deepspeed-autotuning":
            published = DeepSpeedAutotuningSampler(families, seed=seed)
            return NamedSampler(name=name, sampler=published, rung_by_rung=True)
        case "random":
            return NamedSampler(name=name, sampler=ListSampler(families, seed=seed))
        case "grid":
            return NamedSampler(name=name, sampler=ListSampler(families, seed=None))
        case "tpe":
            return NamedSampler(name=name, sampler=_tpe(seed), first_families=3)
        case "gp":
            return NamedSampler(name=name, sampler=_gp(seed), first_families=3)
    raise AutotuneError(f"--sampler {name}: known are {', '.join(SAMPLERS)}.")


def _tpe(seed: int) -> optuna.samplers.BaseSampler:
    with warnings.catch_warnings():
        # `multivariate` and `group` are marked experimental; families have parameters of their own.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True)


def _gp(seed: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.GPSampler(seed=seed, warn_independent_sampling=False)
