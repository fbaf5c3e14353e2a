"""Baselines that go through the families of a study one by one: in order, or at random."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial

from autotune.search.parameters import FAMILY, distributions, params_of
from autotune.search.policy import Offer
from autotune.search.space import Family


class ListSampler(optuna.samplers.BaseSampler):  # type: ignore[misc]
    """Names each family once: in the order of its name (a grid), or drawn without replacement.

    Args:
        families: The finite space.
        seed: Draws at random; None goes in order.
    """

    def __init__(self, families: Sequence[Family], *, seed: int | None) -> None:
        self._families = sorted(families, key=lambda family: family.name)
        self._space = distributions(families)
        self._generator = None if seed is None else np.random.default_rng(seed)
        self._fallback = optuna.samplers.RandomSampler(seed=seed)
        self._open = {family.name for family in families}

    def offer(self, offer: Offer) -> None:
        """Say which families can be measured."""
        self._open = set(offer.rungs)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return the finite space."""
        return self._space

    def sample_relative(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        """Return the next family, and the first micro batch of its ladder."""
        left = [family for family in self._families if family.name in self._open]
        if FAMILY not in search_space or not left:
            return {}
        place = 0 if self._generator is None else int(self._generator.integers(len(left)))
        return params_of(left[place], left[place].ladder[0].plan.micro_batch_size)

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Sample a parameter outside the finite space, as `RandomSampler` does."""
        return self._fallback.sample_independent(study, trial, param_name, param_distribution)
