"""Enumerate the legal plans of a workload, estimate each, rank them."""

from autotune.planner.estimate import Estimate, estimate_plan, judged, predict_memory
from autotune.planner.layouts import CP_DEGREES, enumerate_plans, make_plan
from autotune.planner.order import best_first, best_first_index, closest_to_fitting
from autotune.planner.ranking import Ranking, estimate_space, rank_plans
from autotune.planner.refusals import nothing_fits, refusal_lines

__all__ = [
    "CP_DEGREES", "Estimate", "Ranking", "best_first", "best_first_index", "closest_to_fitting",
    "enumerate_plans", "estimate_plan", "estimate_space", "judged", "make_plan", "nothing_fits",
    "predict_memory", "rank_plans", "refusal_lines",
]  # fmt: skip
