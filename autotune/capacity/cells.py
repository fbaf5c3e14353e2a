"""`Cell`: one GPU type and count, with the best configuration there and what a training takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from autotune.capacity.calibration import Calibration, Factors
from autotune.errors import AutotuneError
from autotune.memory import Verdict
from autotune.planner import (
    Estimate,
    best_first,
    closest_to_fitting,
    estimate_space,
    nothing_fits,
)
from autotune.spec.hardware import HardwareSpec, load_hardware
from autotune.spec.model import ModelSpec
from autotune.spec.strategy import Strategy
from autotune.spec.workload import Workload

_HOUR_S = 3600.0
_DAY_S = 86400.0


class Fit(StrEnum):
    """What is said of a cell."""

    FITS = "fits"
    AT_RISK = "at_risk"
    """The assumed error of the estimate does not decide it."""
    OOM = "oom"
    """Every configuration needs too much memory."""
    REFUSED = "refused"
    """No such cluster, or no legal configuration on it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What is asked of every cell."""

    model: ModelSpec
    workload: Workload
    tokens: int | None = None
    """Length of the training; None asks what the budget, the deadline or both allow."""
    budget: float | None = None
    deadline_s: float | None = None
    prices: Mapping[str, float]
    """Of one GPU and hour, by GPU type."""
    with_power: bool = False
    tp_degrees: Sequence[int] = (1,)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """The answer for one GPU type and count."""

    gpu_type: str
    num_gpus: int
    fit: Fit
    question: Question
    reason: str = ""
    """Why there is no configuration; empty when there is one."""
    hardware: HardwareSpec | None = None
    best: Estimate | None = None
    """The fastest configuration that fits, as calibrated; of one that fits not the closest."""
    predicted: Estimate | None = None
    """`best` before calibration."""
    factors: Factors | None = None

    @property
    def basis(self) -> str:
        """Whether a study corrected the numbers."""
        return "calibrated" if self.factors else "predicted"

    @property
    def runs(self) -> bool:
        """Whether there is a configuration with a chance to fit."""
        return self.fit in (Fit.FITS, Fit.AT_RISK)

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens a second over all GPUs."""
        return self.best.time.tokens_per_s if self.runs and self.best else None

    @property
    def missing_bytes(self) -> int | None:
        """What the closest configuration lacks, on a device or on a host."""
        if self.fit is not Fit.OOM or self.best is None or self.hardware is None:
            return None
        peak, hardware = self.best.peak, self.hardware
        device = peak.expected_bytes - hardware.gpu.memory_bytes
        host = peak.node_host_bytes(hardware.gpus_per_node) - hardware.host_memory_bytes
        return max(device, host)

    @property
    def price(self) -> float | None:
        """Of one GPU and hour."""
        return self.question.prices.get(self.gpu_type)

    @property
    def trained_tokens(self) -> float | None:
        """Tokens trained: those asked for, or what the budget and the deadline allow."""
        rate = self.tokens_per_s
        if rate is None or self.question.tokens is not None:
            return self.question.tokens if rate is not None else None
        return self.most_tokens

    @property
    def most_tokens(self) -> float | None:
        """What the limits allow: the budget, the deadline or both."""
        in_budget = self.question.budget is not None
        return self.tokens_in_budget if in_budget else self.tokens_in_deadline

    @property
    def tokens_in_budget(self) -> float | None:
        """What the budget pays for, within the deadline where there is one."""
        rate, price, budget = self.tokens_per_s, self.price, self.question.budget
        if rate is None or price is None or budget is None:
            return None
        paid_s = budget / (price * self.num_gpus) * _HOUR_S
        return rate * min(paid_s, self.question.deadline_s or paid_s)

    @property
    def tokens_in_deadline(self) -> float | None:
        """What it trains until the deadline; None without one."""
        rate, deadline = self.tokens_per_s, self.question.deadline_s
        return None if rate is None or deadline is None else rate * deadline

    @property
    def train_s(self) -> float | None:
        """Seconds the training takes, without start-up, evaluation or checkpoints."""
        rate, tokens = self.tokens_per_s, self.trained_tokens
        return None if rate is None or tokens is None else tokens / rate

    @property
    def days(self) -> float | None:
        """`train_s` in days."""
        return None if self.train_s is None else self.train_s / _DAY_S

    @property
    def gpu_hours(self) -> float | None:
        """GPUs times hours."""
        return None if self.train_s is None else self.num_gpus * self.train_s / _HOUR_S

    @property
    def cost(self) -> float | None:
        """GPU-hours at their price."""
        hours, price = self.gpu_hours, self.price
        return None if hours is None or price is None else hours * price

    @property
    def kwh(self) -> float | None:
        """Energy of the boards at their TDP throughout; no host, no cooling."""
        hours = self.gpu_hours
        watts = self.hardware.gpu.power_w if self.hardware else None
        if not self.question.with_power or hours is None or watts is None:
            return None
        return hours * watts / 1000

    @property
    def meets_deadline(self) -> bool | None:
        """Whether it ends in time; None without a deadline or a length of the training."""
        question = self.question
        if question.deadline_s is None or question.tokens is None:
            return None
        return self.train_s is not None and self.train_s <= question.deadline_s

    @property
    def within_budget(self) -> bool | None:
        """Whether the budget pays for it; None without a budget or a length of the training."""
        question = self.question
        if question.budget is None or question.tokens is None:
            return None
        return self.cost is not None and self.cost <= question.budget

    def describe(self) -> str:
        """Return such as ``8 x h100-sxm``."""
        return f"{self.num_gpus} x {self.gpu_type}"

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form; what does not apply is None."""
        best, predicted, hardware = self.best, self.predicted, self.hardware
        return {
            "gpu_type": self.gpu_type,
            "num_gpus": self.num_gpus,
            "num_nodes": hardware.num_nodes if hardware else None,
            "verdict": str(self.fit),
            "fit_probability": best.fit_probability if best else None,
            "reason": self.reason,
            "basis": self.basis,
            "calibration": self.factors.to_dict() if self.factors else None,
            "configuration": best.plan.describe() if best else None,
            "plan": best.plan.to_dict() if best else None,
            "tokens_per_s": self.tokens_per_s,
            "predicted_tokens_per_s": predicted.time.tokens_per_s if predicted else None,
            "memory_bytes": best.memory.total_bytes if best else None,
            "predicted_memory_bytes": predicted.memory.total_bytes if predicted else None,
            "device_memory_bytes": hardware.gpu.memory_bytes if hardware else None,
            "missing_bytes": self.missing_bytes,
            "days": self.days,
            "gpu_hours": self.gpu_hours,
            "price_per_gpu_hour": self.price,
            "cost": self.cost,
            "kwh": self.kwh,
            "meets_deadline": self.meets_deadline,
            "tokens_in_budget": self.tokens_in_budget,
            "within_budget": self.within_budget,
            "tokens_in_deadline": self.tokens_in_deadline,
        }


def make_cells(
    question: Question,
    gpu_types: Mapping[str, str],
    counts: Sequence[int],
    strategies: Sequence[Strategy],
    *,
    memory_limit_bytes: int | None = None,
    calibration: Calibration | None = None,
) -> list[Cell]:
    """Plan every GPU type on every count.

    A count that is no whole number of nodes, or leaves no legal configuration, is a cell with its
    reason: it is an answer, and the other cells still are.

    Args:
        question: What is asked.
        gpu_types: What `load_hardware` takes, by the name to show.
        counts: GPUs over all nodes.
        strategies: What to plan with.
        memory_limit_bytes: Lowers the memory of each device.
        calibration: Corrects the cells of its GPU type.
    """
    cells = []
    for name, given in gpu_types.items():
        corrected = calibration if calibration and calibration.gpu_type == name else None
        for count in counts:
            try:
                hardware = load_hardware(given, count, memory_limit_bytes)
                cell = _make_cell(question, name, hardware, strategies, corrected)
            except AutotuneError as error:
                cell = Cell(
                    gpu_type=name,
                    num_gpus=count,
                    fit=Fit.REFUSED,
                    question=question,
                    reason=str(error),
                )
            cells.append(cell)
    return cells


def _make_cell(
    question: Question,
    name: str,
    hardware: HardwareSpec,
    strategies: Sequence[Strategy],
    calibration: Calibration | None,
) -> Cell:
    ranking = estimate_space(
        question.model,
        question.workload,
        hardware,
        strategies,
        tp_degrees=question.tp_degrees,
    )
    predicted = {estimate.plan.id: estimate for estimate in ranking.candidates}
    candidates: Sequence[Estimate] = ranking.candidates
    if calibration is not None:
        candidates = best_first([calibration.apply(e, hardware) for e in candidates])
    best, reason = candidates[0], ""
    if best.verdict is Verdict.OOM:
        best = closest_to_fitting(candidates)
        reason = nothing_fits(question.model, hardware, candidates)
    return Cell(
        gpu_type=name,
        num_gpus=hardware.num_gpus,
        fit=Fit(str(best.verdict)),
        question=question,
        reason=reason,
        hardware=hardware,
        best=best,
        predicted=predicted[best.plan.id],
        factors=calibration.factors(best.plan.engine) if calibration else None,
    )
