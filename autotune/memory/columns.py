"""`PlanColumns`: many plans as arrays, so that a million of them needs no million objects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autotune.plan import CpBackend, Plan

Array = NDArray[np.float64]
Index = NDArray[np.int64]

NUMBERS = (
    "micro_batch_size", "grad_accum_steps", "dp_replicate", "dp_shard", "cp", "bucket_elements",
)  # fmt: skip
"""Fields of a plan in which the plans of one layout may differ."""
_alike = attrgetter(
    "strategy", "engine", "zero_stage", "reshard_after_forward", "offload_optimizer",
    "offload_params", "recompute", "tp", "cp_backend", "heads_k_stride", "hpz",
)  # fmt: skip
_numbers = attrgetter(*NUMBERS)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PlanColumns:
    """Plans of few layouts, which differ within one in `NUMBERS` alone."""

    layouts: tuple[Plan, ...]
    """A plan of each layout."""
    layout: Index
    """Of each plan, the index into `layouts`."""
    numbers: Array
    """``[plans, len(NUMBERS)]``."""

    @classmethod
    def of(cls, plans: Sequence[Plan]) -> PlanColumns:
        """Lay plans out as columns, in their order."""
        found: dict[tuple[object, ...], int] = {}
        layouts: list[Plan] = []
        layout = np.zeros(len(plans), np.int64)
        for position, plan in enumerate(plans):
            number = found.setdefault(_alike(plan), len(layouts))
            if number == len(layouts):
                layouts.append(plan)
            layout[position] = number
        numbers = np.array([_numbers(plan) for plan in plans], float).reshape(-1, len(NUMBERS))
        return cls(layouts=tuple(layouts), layout=layout, numbers=numbers)

    @classmethod
    def joined(cls, parts: Sequence[tuple[Plan, Array]]) -> PlanColumns:
        """Return the plans of several layouts, each with the numbers of its plans."""
        counts = [len(numbers) for _, numbers in parts]
        return cls(
            layouts=tuple(plan for plan, _ in parts),
            layout=np.repeat(np.arange(len(parts)), counts),
            numbers=np.concatenate([numbers for _, numbers in parts]),
        )

    def __len__(self) -> int:
        return len(self.layout)

    def plan(self, position: int) -> Plan:
        """Return one plan as an object."""
        numbers: dict[str, Any] = dict(zip(NUMBERS, map(int, self.numbers[position]), strict=True))
        return replace(self.layouts[int(self.layout[position])], **numbers)

    @property
    def world_size(self) -> Array:
        """Ranks of each plan."""
        tp = np.array([plan.tp for plan in self.layouts], float)
        own = tp[self.layout] if len(self) else 1.0
        return np.asarray(self.numbers[:, 2:5].prod(axis=1) * own, float)

    def groups(self) -> Iterator[tuple[Plan, Index]]:
        """Yield the plans that share layout and trace key: one of them, and the index of all.

        A lone sequence that is exchanged has a trace key of its own (`TraceKey.single`), and so
        has each degree of a ring (`TraceKey.gathered`).
        """
        batch, cp = self.numbers[:, 0], self.numbers[:, 4]
        ring = np.array([plan.cp_backend is CpBackend.RING for plan in self.layouts], bool)
        degree = np.where(ring[self.layout], cp, np.minimum(cp, 2)) if len(self) else cp
        labels = (degree.max(initial=1) + 1) * self.layout + degree
        labels = 2 * labels + ((cp > 1) & (batch == 1))
        order = np.argsort(labels, kind="stable")
        cuts = np.flatnonzero(np.diff(labels[order])) + 1
        for index in np.split(order, cuts) if len(order) else ():
            yield self.plan(int(index[0])), index
