"""Baselines that go through the families of a study one by one: in order, or at random."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import optuna

from autotune.search.finite_sampler import FiniteSampler
from autotune.search.policy import Offer
from autotune.search.space import Family


class ListSampler(FiniteSampler):
    """Names each family once: in the order of its name (a grid), or drawn without replacement.

    Args:
        families: The finite space.
        seed: Draws at random; None goes in order.
    """

    def __init__(self, families: Sequence[Family], *, seed: int | None) -> None:
        super().__init__(families, seed=seed)
        self._families = sorted(families, key=lambda family: family.name)
        self._generator = None if seed is None else np.random.default_rng(seed)
        self._open = {family.name for family in families}

    def offer(self, offer: Offer) -> None:
        """Say which families can be measured."""
        self._open = set(offer.rungs)

    def next_point(self, study: optuna.Study) -> tuple[Family, int] | None:
        """Return the next family, and the first micro batch of its ladder."""
        left = [family for family in self._families if family.name in self._open]
        if not left:
            return None
        place = 0 if self._generator is None else int(self._generator.integers(len(left)))
        return left[place], left[place].ladder[0].plan.micro_batch_size
