"""What samplers over the finite space of a study have in common towards Optuna."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial

from autotune.search.parameters import FAMILY, distributions, params_of
from autotune.search.space import Family


class FiniteSampler(optuna.samplers.BaseSampler):  # type: ignore[misc]
    """Names a family and a micro batch; over any other space it samples as `RandomSampler` does.

    Args:
        families: The finite space; none for a space of Optuna's own.
        seed: Of the sampler other spaces fall back to.
    """

    def __init__(self, families: Sequence[Family], *, seed: int | None) -> None:
        self._space = distributions(families) if families else {}
        self._fallback = optuna.samplers.RandomSampler(seed=seed)

    @abstractmethod
    def next_point(self, study: optuna.Study) -> tuple[Family, int] | None:
        """Return the family and the micro batch to measure next; None where there is none."""

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return the finite space; empty where there is none, which leaves all to the fallback."""
        return self._space

    def sample_relative(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        """Return the next point as Optuna's parameters."""
        self._raise_error_if_multi_objective(study)
        point = self.next_point(study) if FAMILY in search_space else None
        return {} if point is None else params_of(*point)

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Sample a parameter outside the finite space, as `RandomSampler` does."""
        self._raise_error_if_multi_objective(study)
        return self._fallback.sample_independent(study, trial, param_name, param_distribution)

    def reseed_rng(self) -> None:
        """Give the fallback another seed."""
        self._fallback.reseed_rng()
