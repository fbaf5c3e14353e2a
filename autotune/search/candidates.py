"""The rungs of a study as arrays: what a model of their speed works on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from autotune.plan import Engine, Plan
from autotune.planner import Estimate
from autotune.search.space import Family

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

GROUPS: tuple[tuple[str, Callable[[Plan], object]], ...] = (
    ("engine", lambda plan: plan.engine),
    (
        "sharding",
        lambda plan: (
            plan.engine, plan.zero_stage if plan.engine is Engine.DEEPSPEED
            else plan.reshard_after_forward, plan.dp_replicate > 1,
        ),
    ),
    ("offload", lambda plan: (plan.offload_optimizer, plan.offload_params)),
    ("cp", lambda plan: (plan.cp, plan.cp_backend, plan.tp)),
    ("recompute", lambda plan: plan.recompute),
    ("cp and engine", lambda plan: (plan.cp, plan.cp_backend, plan.tp, plan.engine)),
)  # fmt: skip
"""What plans can have in common; a prediction that is wrong for one is wrong for its like."""


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Every rung of every family, in the families' order, ascending within each."""

    families: tuple[Family, ...]
    estimates: tuple[Estimate, ...]
    family: Integers
    """Position of each rung's family in `families`."""
    groups: Integers
    """Shape (rungs, len(GROUPS)): equal numbers where two plans have that trait in common."""
    log2_micro_batch: Floats
    predicted_step_s: Floats
    log_rate: Floats
    """Predicted log tokens/s: the prior mean."""

    @classmethod
    def of(
        cls, families: Sequence[Family], log_correction: Mapping[str, float] | None = None
    ) -> Candidates:
        """Lay the families out.

        Args:
            families: The finite space.
            log_correction: By plan id, what earlier studies on this machine add to the logarithm
                of the predicted step time.
        """
        rungs = [(n, e) for n, family in enumerate(families) for e in family.ladder]
        estimates = tuple(e for _, e in rungs)
        plans = [e.plan for e in estimates]
        known = log_correction or {}
        shift = np.array([known.get(p.id, 0.0) for p in plans]) if known else 0.0
        step_s = np.array([e.time.step_s for e in estimates]) * np.exp(shift)
        tokens = np.array([e.time.tokens_per_step for e in estimates], dtype=float)
        return cls(
            families=tuple(families),
            estimates=estimates,
            family=np.array([n for n, _ in rungs], dtype=np.int64),
            groups=np.stack([_codes([trait(p) for p in plans]) for _, trait in GROUPS], axis=1),
            log2_micro_batch=np.log2([p.micro_batch_size for p in plans]),
            predicted_step_s=step_s,
            log_rate=np.log(tokens / step_s),
        )

    def __len__(self) -> int:
        return len(self.estimates)

    @cached_property
    def position(self) -> dict[str, int]:
        """Index of each plan by its id."""
        return {estimate.plan.id: n for n, estimate in enumerate(self.estimates)}

    @cached_property
    def place(self) -> dict[tuple[str, int], int]:
        """Index of each rung by its family's name and its micro batch."""
        names = [self.families[n].name for n in self.family]
        sizes = [estimate.plan.micro_batch_size for estimate in self.estimates]
        return {key: n for n, key in enumerate(zip(names, sizes, strict=True))}

    @cached_property
    def grad_accum_steps(self) -> Floats:
        """Accumulation of each rung."""
        return np.array([e.plan.grad_accum_steps for e in self.estimates], dtype=float)


def _codes(values: Sequence[object]) -> Integers:
    known: dict[object, int] = {}
    return np.array([known.setdefault(value, len(known)) for value in values], dtype=np.int64)
