"""The rows of a recorded landscape: one measured (round, plan), as NAME.csv holds it.

Times are in seconds, lists are JSON. Every number is what a launch measured; where one was not
measured the cell is empty.
"""

from __future__ import annotations

import csv
import json
import os
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any

from record_clock import LaunchClock
from record_spaces import Arm

from autotune.errors import AutotuneError
from autotune.plan import Plan
from autotune.trial.launch import Ended
from autotune.trial.outcome import read_rungs
from autotune.trial.protocol import AccumulationResult, Outcome, RankResult, Request, Rung
from autotune.trial.record import TrialRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One plan as one launch measured it; field order is the CSV's column order."""

    round: int
    """From 1. Round 0 holds the cold launches, which are there for their starts."""
    launch: int
    family: str
    strategy: str
    cp: int
    recompute: str
    micro_batch_size: int
    grad_accum_steps: int
    plan: str
    plan_id: str
    outcome: str
    step_tokens: float | None
    """Valid tokens of an optimizer step of the data's average sequences."""
    step_times_s: str
    """Every counted optimizer step at the plan's own accumulation, slowest rank."""
    warmup_s: float | None
    """What of `rung_wall_s` was not counted: warm-up steps and the change of micro batch."""
    rung_wall_s: float
    """What the rung took, its warm-up included; of a failed one, up to the end of the launch."""
    launch_ready_s: float | None
    """From the request to the first step, slowest rank; the same for all rows of a launch."""
    launch_mode: str
    """``fork`` from a preloaded process or ``cold``."""
    micro_step_s: str
    """Micro-steps without synchronisation, rank 0."""
    sync_micro_step_s: str
    optimizer_step_s: str
    peak_allocated_bytes: int | None
    peak_reserved_bytes: int | None
    message: str


COLUMNS = [field.name for field in fields(Row)]


def rows_of(
    arm: Arm,
    request: Request,
    ended: Ended,
    clock: LaunchClock,
    *,
    round_number: int,
    launch: int,
    mode: str,
) -> list[Row]:
    """Return a row for each rung that a launch reached, the failed one included."""
    ready_s = clock.ready_s
    rows: list[Row] = []
    for record in read_rungs(request, ended.results, ended.outcome, ended.message):
        plan = record.plan_object
        parts = _parts(ended.results, plan)
        ran = record.outcome in (Outcome.OK, Outcome.THRASH)
        if ran:
            wall_s = clock.wall_s[plan.micro_batch_size]
        else:  # what is left of the launch: the failed rung, and noticing that it failed
            wall_s = max(0.0, ended.elapsed_s - (ready_s or 0.0) - sum(r.rung_wall_s for r in rows))
        rows.append(
            Row(
                round=round_number,
                launch=launch,
                family=arm.name,
                strategy=plan.strategy,
                cp=plan.cp,
                recompute=str(plan.recompute),
                micro_batch_size=plan.micro_batch_size,
                grad_accum_steps=plan.grad_accum_steps,
                plan=json.dumps(plan.to_dict(), separators=(",", ":")),
                plan_id=plan.id,
                outcome=str(record.outcome),
                step_tokens=record.step_tokens,
                step_times_s=_json(_counted(record, plan) if ran else []),
                warmup_s=max(0.0, wall_s - sum(record.step_times_s)) if ran else None,
                rung_wall_s=wall_s,
                launch_ready_s=ready_s,
                launch_mode=mode,
                micro_step_s=_json(parts.micro_step_s if parts and ran else []),
                sync_micro_step_s=_json(parts.sync_micro_step_s if parts and ran else []),
                optimizer_step_s=_json(parts.optimizer_step_s if parts and ran else []),
                peak_allocated_bytes=record.peak_allocated_bytes,
                peak_reserved_bytes=record.peak_reserved_bytes,
                message=record.message,
            )
        )
    return rows


def _counted(record: TrialRecord, plan: Plan) -> tuple[float, ...]:
    """Return the step times, which must be those of the plan's own accumulation."""
    if plan.grad_accum_steps not in record.measured_accum_steps:
        raise AutotuneError(
            f"{plan.describe()} was measured at accumulation {record.measured_accum_steps} only. "
            "A landscape holds true accumulations: raise Measurement.max_direct_accumulation."
        )
    return record.step_times_s


def _parts(results: list[RankResult], plan: Plan) -> AccumulationResult | None:
    """Return what rank 0 measured at the plan's own accumulation."""
    rungs = results[0].rungs if results else []
    accumulations = [
        part
        for rung in rungs
        if rung.micro_batch_size == plan.micro_batch_size
        for part in rung.accumulations
        if part.grad_accum_steps == plan.grad_accum_steps
    ]
    return accumulations[0] if accumulations else None


def _json(values: Any) -> str:
    return json.dumps([round(value, 6) for value in values])


def rungs_of(plans: tuple[Plan, ...]) -> list[Rung]:
    return [
        Rung(micro_batch_size=p.micro_batch_size, grad_accum_steps=p.grad_accum_steps)
        for p in plans
    ]


class RowFile:
    """NAME.csv: rows are appended launch by launch, on the disk before the next launch starts."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows: list[Row] = []
        if path.exists():
            self._cut_half_written_line()
            with path.open(newline="") as file:
                self.rows = [_read(values) for values in csv.DictReader(file)]
        else:
            with path.open("w", newline="") as file:
                csv.writer(file).writerow(COLUMNS)

    def add(self, rows: list[Row]) -> None:
        with self._path.open("a", newline="") as file:
            csv.writer(file).writerows(
                ["" if value is None else value for value in astuple(row)] for row in rows
            )
            file.flush()
            os.fsync(file.fileno())
        self.rows += rows

    def next_launch(self) -> int:
        return max((row.launch for row in self.rows), default=0) + 1

    def measured(self, round_number: int, mode: str | None = None) -> set[str]:
        """Return the ids of the plans that a round has, of one launch mode or of any."""
        return {
            row.plan_id
            for row in self.rows
            if row.round == round_number and mode in (None, row.launch_mode)
        }

    def _cut_half_written_line(self) -> None:
        data = self._path.read_bytes()
        os.truncate(self._path, data.rfind(b"\n") + 1)


_OPTIONAL_INT = ("peak_allocated_bytes", "peak_reserved_bytes")
_INT = ("round", "launch", "cp", "micro_batch_size", "grad_accum_steps")
_FLOAT = ("step_tokens", "warmup_s", "rung_wall_s", "launch_ready_s")


def _read(values: dict[str, str]) -> Row:
    kinds: dict[str, Any] = dict.fromkeys((*_INT, *_OPTIONAL_INT), int)
    kinds |= dict.fromkeys(_FLOAT, float)
    converted = {
        name: kinds[name](text) if text and name in kinds else (text if name not in kinds else None)
        for name, text in values.items()
    }
    return replace(Row(**converted))
