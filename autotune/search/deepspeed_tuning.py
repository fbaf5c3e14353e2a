"""DeepSpeed Autotuning's published algorithm, on the space of a study.

After deepspeed/autotuning/autotuner.py of DeepSpeed 0.19 in its default fast mode (`tune`,
`tune_space`, `get_min_max_micro_batch_size`, `run_tuning_micro_batch_sizes`, `get_plateau_mbs`):
ZeRO stages 0 to 3 in this order; in each, the smallest micro batch, then the largest that memory is
calculated to hold, going down while it fails; then, from half of that upwards, the micro batches
between; a gain of less than 5% is a plateau and ends the stage; a stage that is calculated to hold
less than the one before is left out. It knows no FSDP, no sequence parallelism, no recomputation
and no offload, so those families are never asked for. What differs from the published: micro
batches are the study's, the global batch is fixed (there, the accumulation), a launch measures an
ascending ladder, so that the points of a stage are taken in ascending order, and the profiling
run of the model that comes first is not charged.
"""

from __future__ import annotations

from collections.abc import Sequence

import optuna

from autotune.plan import Engine, Plan, Recompute
from autotune.planner import Estimate
from autotune.search.finite_sampler import FiniteSampler
from autotune.search.policy import Offer
from autotune.search.space import Family
from autotune.search.told import PLAN_ID

METRIC_PERCENT_DIFF = 0.05
"""METRIC_PERCENT_DIFF_CONST in deepspeed/autotuning/constants.py."""


class DeepSpeedAutotuningSampler(FiniteSampler):
    """Asks for what DeepSpeed Autotuning would measure, and ends where it would.

    Args:
        families: The finite space.
        seed: Of the sampler other spaces fall back to; over the finite space nothing is drawn.
    """

    def __init__(self, families: Sequence[Family], *, seed: int | None = None) -> None:
        super().__init__(families, seed=seed)
        stages = [family for family in families if _stage(family.ladder[0].plan) is not None]
        self._stages = sorted(stages, key=lambda family: _stage(family.ladder[0].plan) or 0)
        self._offer: Offer | None = None

    def offer(self, offer: Offer) -> None:
        """Say what can be measured."""
        self._offer = offer

    def finished(self, study: optuna.Study) -> str | None:
        """Return why the search is over; None while the algorithm has a next point."""
        if self.next_point(study) is not None:
            return None
        return "DeepSpeed Autotuning's algorithm has no further point in this space"

    def next_point(self, study: optuna.Study) -> tuple[Family, int] | None:
        """Return the next point of the algorithm."""
        values = {
            trial.user_attrs[PLAN_ID]: trial.value or 0.0
            for trial in study.get_trials(deepcopy=False)
            if trial.state.is_finished() and PLAN_ID in trial.user_attrs
        }
        largest_before = 0
        for family in self._stages:
            calculated = _calculated_max(family.ladder)
            if calculated < largest_before:
                continue
            point, largest = self._point(family, values, largest_before, calculated)
            if point is not None:
                return family, point
            largest_before = max(largest_before, largest)
        return None

    def _point(
        self, family: Family, values: dict[str, float], smallest: int, calculated: int
    ) -> tuple[int | None, int]:
        """Return the next micro batch of a stage, or None, and the largest that ran."""
        sizes = [e.plan.micro_batch_size for e in family.ladder]
        wanted = [s for s in sizes if smallest <= s <= calculated and 2 * s >= calculated]
        first = next((s for s in sizes if s >= max(1, smallest)), None)
        order = sorted({*wanted, *([] if first is None or first > calculated else [first])})
        before, largest = 0.0, 0
        for size in order:
            value = values.get(family.rung(size).plan.id)
            if value is None:
                return (size if self._is_open(family, size) else None), largest
            if not value:
                break
            largest = size
            if before and value < before * (1 + METRIC_PERCENT_DIFF):
                break
            before = value
        return None, largest

    def _is_open(self, family: Family, size: int) -> bool:
        offer = self._offer
        if offer is None:
            return True
        return any(e.plan.micro_batch_size == size for e in offer.rungs.get(family.name, ()))


def _stage(plan: Plan) -> int | None:
    """Return the ZeRO stage that a plan is to DeepSpeed Autotuning; None for what it knows not."""
    plain = plan.cp == 1 and plan.recompute is Recompute.NONE and not plan.offload_optimizer
    if not plain or plan.offload_params:
        return None
    if plan.engine is Engine.DDP:
        return 0
    return plan.zero_stage if plan.engine is Engine.DEEPSPEED else None


def _calculated_max(ladder: Sequence[Estimate]) -> int:
    """Return the largest micro batch that memory is calculated to hold; 0 for none."""
    return max((e.plan.micro_batch_size for e in ladder if e.fit_probability >= 0.5), default=0)
