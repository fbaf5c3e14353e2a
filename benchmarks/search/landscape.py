"""Read a recorded landscape: every configuration of a space, really measured, with repeats.

NAME.csv has a row a (round, plan), NAME.json what it was measured on; `record.py` writes both.
NAME.calibration.json, where there is one, is the sweep of that machine that a search would have had
from `autotune doctor --measure`.
"""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from autotune.calibrate.store import read_calibration
from autotune.plan import Plan, Recompute
from autotune.planner import estimate_space
from autotune.search.space import Family, make_families
from autotune.spec.hardware import HardwareSpec, Link, load_hardware
from autotune.spec.model import ModelSpec, load_model
from autotune.spec.strategy import load_strategies
from autotune.spec.workload import Workload
from autotune.timing import Calibration
from autotune.trial.protocol import Outcome

FOLDER = Path(__file__).parent / "landscapes"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One plan as one launch measured it."""

    round: int
    launch: int
    plan: Plan
    outcome: Outcome
    message: str
    step_tokens: float
    step_times_s: tuple[float, ...]
    """Counted steps at the plan's accumulation; empty where it did not run."""
    warmup_s: float
    rung_wall_s: float
    launch_ready_s: float
    launch_mode: str
    peak_allocated_bytes: int | None
    peak_reserved_bytes: int | None

    @property
    def rate(self) -> float:
        """Tokens/s by the median step, as a search would report it."""
        return self.step_tokens / statistics.median(self.step_times_s)

    @property
    def ran(self) -> bool:
        return self.outcome is Outcome.OK and bool(self.step_times_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class Truth:
    """What the rounds say of a plan: the mean of its launches and the standard error of that."""

    rate: float
    error: float


@dataclass(frozen=True, kw_only=True)
class Landscape:
    name: str
    model: ModelSpec
    workload: Workload
    hardware: HardwareSpec
    families: tuple[Family, ...]
    """As a search would make them, of the plans that were measured."""
    by_formulas: tuple[Family, ...]
    """The same, predicted without what was measured of the machine."""
    rows: dict[str, tuple[Row, ...]]
    """By plan id; launches of the usual mode only."""
    cold_ready_s: dict[str, float]
    """By engine, of launches without a preloaded process."""
    story: dict[str, Any]
    sweep_s: float | None
    """What measuring the machine took (`doctor --measure`); None where it was not."""

    @cached_property
    def truth(self) -> dict[str, Truth]:
        """Return the truth of every plan that always ran.

        A plan of a single launch takes the error that plans of several have in the median.
        """
        rates = {
            plan: [row.rate for row in rows]
            for plan, rows in self.rows.items()
            if all(row.ran for row in rows)
        }
        spread = self.launch_spread
        return {
            plan: Truth(
                rate=statistics.mean(own),
                error=(
                    max(statistics.stdev(own), 1e-9)
                    if len(own) > 1
                    else spread * statistics.mean(own)
                )
                / math.sqrt(len(own)),
            )
            for plan, own in rates.items()
        }

    @cached_property
    def launch_spread(self) -> float:
        """Median relative standard deviation between launches of one plan; 0 of single ones."""
        spreads = [
            statistics.stdev(rates) / statistics.mean(rates)
            for rows in self.rows.values()
            if len(rates := [row.rate for row in rows if row.ran]) > 1
        ]
        return statistics.median(spreads) if spreads else 0.0

    @cached_property
    def best(self) -> str:
        return max(self.truth, key=lambda plan: self.truth[plan].rate)

    def gap(self, plan_id: str | None) -> float:
        """Return how much slower a plan's mean is than the best's, relative, noise and all."""
        found = self.truth.get(plan_id or "")
        return 1.0 if found is None else 1 - found.rate / self.truth[self.best].rate

    def regret(self, plan_id: str | None) -> float:
        """Return how much slower a plan is than the best, relative; 0 within the noise.

        No answer, or one that does not always run, is all of it.
        """
        found = self.truth.get(plan_id or "")
        if found is None:
            return 1.0
        best = self.truth[self.best]
        gap = best.rate - found.rate
        if gap <= math.hypot(best.error, found.error):
            return 0.0
        return gap / best.rate

    def ready_s(self, plan: Plan) -> list[float]:
        """Return the recorded starts of launches of a plan's family, else of its engine."""
        by_family = self._starts.get(plan.family_id)
        return by_family or self._starts[str(plan.engine)]

    def cold_s(self, plan: Plan) -> float:
        """Return what a cold start of a plan takes, by its engine."""
        engine = str(plan.engine)
        offload = f"{engine}-offload" if plan.offload_optimizer else engine
        found = self.cold_ready_s.get(offload) or self.cold_ready_s.get(engine)
        return found or statistics.mean(self.cold_ready_s.values())

    @cached_property
    def _starts(self) -> dict[str, list[float]]:
        starts: dict[str, dict[int, float]] = defaultdict(dict)
        for rows in self.rows.values():
            for row in rows:
                for key in (row.plan.family_id, str(row.plan.engine)):
                    starts[key][row.launch] = row.launch_ready_s
        return {key: list(own.values()) for key, own in starts.items()}


def landscape_names(folder: Path = FOLDER) -> list[str]:
    return sorted(file.stem for file in folder.glob("*.csv") if file.with_suffix(".json").exists())


def load_landscape(name: str, folder: Path = FOLDER) -> Landscape:
    """Read a landscape and make its families with the predictions of this version."""
    story = json.loads((folder / f"{name}.json").read_text())
    with (folder / f"{name}.csv").open(newline="") as file:
        rows = [_row(values) for values in csv.DictReader(file)]
    usual = [row for row in rows if row.round >= 1]
    cold = [row for row in rows if row.launch_mode == "cold" and row.launch_ready_s]
    by_plan: dict[str, list[Row]] = defaultdict(list)
    for row in usual:
        by_plan[row.plan.id].append(row)
    model = load_model(story["model"]["name"])
    workload = Workload.model_validate(story["workload"])
    hardware = hardware_of(story)
    calibration = read_calibration(folder / f"{name}.calibration.json")
    families, formulas = (
        tuple(_families(story, model, workload, hardware, set(by_plan), known))
        for known in (calibration, None)
    )
    cold_ready_s: dict[str, list[float]] = defaultdict(list)
    for row in cold:
        offload = "-offload" if row.plan.offload_optimizer else ""
        cold_ready_s[f"{row.plan.engine}{offload}"].append(row.launch_ready_s)
    return Landscape(
        name=name,
        model=model,
        workload=workload,
        hardware=hardware,
        families=families,
        by_formulas=formulas,
        rows={plan: tuple(own) for plan, own in by_plan.items()},
        cold_ready_s={key: statistics.mean(own) for key, own in cold_ready_s.items()},
        story=story,
        sweep_s=None if calibration is None else calibration.duration_s,
    )


def hardware_of(story: dict[str, Any]) -> HardwareSpec:
    """Return the hardware a landscape was recorded on, as the planner saw it."""
    told = story["hardware"]
    limit = story.get("memory_limit_bytes") or told.get("memory_bytes")
    per_node, nodes = told["gpus_per_node"], told["num_nodes"]
    hardware = load_hardware(told["gpu"], per_node, limit, one_node=True)
    if nodes == 1:
        return hardware
    network = Link(alpha_s=hardware.inter_node.alpha_s, bytes_per_s=told["inter_node_bytes_per_s"])
    return replace(hardware, num_nodes=nodes, inter_node=network)


def _families(
    story: dict[str, Any],
    model: ModelSpec,
    workload: Workload,
    hardware: HardwareSpec,
    measured: set[str],
    calibration: Calibration | None,
) -> list[Family]:
    space = story["space"]
    ranking = estimate_space(
        model,
        workload,
        hardware,
        load_strategies(space["strategies"]),
        micro_batches=space["micro_batches"],
        cp_degrees=space["cp_degrees"],
        recompute=[Recompute(mode) for mode in space["recompute"]],
        calibration=calibration,
    )
    families, _ = make_families([e for e in ranking.candidates if e.plan.id in measured])
    return families


def _row(values: dict[str, str]) -> Row:
    return Row(
        round=int(values["round"]),
        launch=int(values["launch"]),
        plan=Plan.from_dict(json.loads(values["plan"])),
        outcome=Outcome(values["outcome"]),
        message=values["message"],
        step_tokens=float(values["step_tokens"] or 0),
        step_times_s=tuple(json.loads(values["step_times_s"] or "[]")),
        warmup_s=float(values["warmup_s"] or 0),
        rung_wall_s=float(values["rung_wall_s"] or 0),
        launch_ready_s=float(values["launch_ready_s"] or 0),
        launch_mode=values["launch_mode"],
        peak_allocated_bytes=_bytes(values["peak_allocated_bytes"]),
        peak_reserved_bytes=_bytes(values["peak_reserved_bytes"]),
    )


def _bytes(text: str) -> int | None:
    return int(text) if text else None


def exhaustive_arms(landscape: Landscape) -> Sequence[Sequence[Plan]]:
    """Return the plans of every measured arm, ascending micro batch: what exhausting means."""
    arms: dict[str, list[Plan]] = defaultdict(list)
    for rows in landscape.rows.values():
        arms[rows[0].plan.family_id].append(rows[0].plan)
    return [sorted(arm, key=lambda plan: plan.micro_batch_size) for arm in arms.values()]
