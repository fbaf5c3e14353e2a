"""A bench that replays a recorded landscape and charges what the recording took."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from landscape import Landscape, Row

from autotune.planner import Estimate
from autotune.search.space import Family
from autotune.trial.outcome import median_interval
from autotune.trial.protocol import Measurement, Outcome
from autotune.trial.record import TrialRecord
from autotune.trial.steps import optimistic_s


class MemoryStore:
    """Records of one replayed search."""

    def __init__(self) -> None:
        self._records: dict[str, TrialRecord] = {}

    def get(self, plan_id: str) -> TrialRecord | None:
        return self._records.get(plan_id)

    def all(self) -> list[TrialRecord]:
        return list(self._records.values())

    def add(self, records: Iterable[TrialRecord]) -> list[TrialRecord]:
        new = [record for record in records if record.plan_id not in self._records]
        self._records |= {record.plan_id: record for record in new}
        return new


class ReplayBench:
    """Draws whole recorded rows; noise between launches and inside them is the recorded one.

    A launch draws a round, and its rungs take that round's rows where it has them. A rung charges
    its recorded warm-up and the steps that `measurement` would count, of those recorded.
    """

    def __init__(self, landscape: Landscape, *, seed: int, measurement: Measurement) -> None:
        self.landscape = landscape
        self.measurement = measurement
        self.draw = random.Random(seed)
        self.num_launches = 0
        self._spent_s = 0.0

    @property
    def spent_s(self) -> float:
        return self._spent_s

    def charge(self, seconds: float) -> None:
        self._spent_s += seconds

    def open(self, family: Family, planned: Sequence[Estimate]) -> ReplayLaunch:
        self.num_launches += 1
        self.charge(self.draw.choice(self.landscape.ready_s(family.ladder[0].plan)))
        return ReplayLaunch(self, family, self.num_launches)


class ReplayLaunch:
    def __init__(self, bench: ReplayBench, family: Family, number: int) -> None:
        self.family = family
        self.alive = True
        self.number = number
        self._bench = bench
        rounds = {row.round for e in family.ladder for row in bench.landscape.rows[e.plan.id]}
        self._round = bench.draw.choice(sorted(rounds))
        self._above = 0

    def measure(
        self, estimate: Estimate, *, give_up_step_s: float | None = None
    ) -> TrialRecord | None:
        plan = estimate.plan
        assert self.alive and plan.micro_batch_size > self._above, "a ladder ascends"
        self._above = plan.micro_batch_size
        rows = self._bench.landscape.rows[plan.id]
        row = next((row for row in rows if row.round == self._round), None)
        row = row or self._bench.draw.choice(rows)
        if not row.ran:
            self.alive = False
            self._bench.charge(row.rung_wall_s)
            return _failed(row, self.number)
        steps = counted_steps(row, self._bench.measurement, give_up_step_s)
        self._bench.charge(row.warmup_s + sum(steps))
        return _measured(row, steps, self.number, estimate)

    def close(self) -> None:
        self.alive = False


def counted_steps(
    row: Row, measurement: Measurement, give_up_step_s: float | None = None
) -> tuple[float, ...]:
    """Return the recorded steps that a rung would count under `measurement`, from the first."""
    steps: list[float] = []
    for step_s in row.step_times_s[: measurement.max_steps]:
        steps.append(step_s)
        if give_up_step_s is not None and optimistic_s(steps) > give_up_step_s:
            break
        if len(steps) >= measurement.min_steps and sum(steps) >= measurement.target_seconds:
            break
    return tuple(steps)


def _measured(row: Row, steps: tuple[float, ...], launch: int, estimate: Estimate) -> TrialRecord:
    spread = median_interval(steps)
    return TrialRecord(
        launch=launch,
        plan_id=row.plan.id,
        outcome=Outcome.OK,
        message="",
        plan=row.plan.to_dict(),
        tokens_per_s=row.step_tokens / spread.median,
        step_tokens=row.step_tokens,
        step_s=spread.median,
        step_s_low=spread.low,
        step_s_high=spread.high,
        measured_accum_steps=(row.plan.grad_accum_steps,),
        peak_allocated_bytes=row.peak_allocated_bytes,
        peak_reserved_bytes=row.peak_reserved_bytes,
        predicted_step_s=estimate.time.step_s,
        step_times_s=steps,
    )


def _failed(row: Row, launch: int) -> TrialRecord:
    return TrialRecord(
        launch=launch,
        plan_id=row.plan.id,
        outcome=row.outcome,
        message=row.message,
        plan=row.plan.to_dict(),
        peak_allocated_bytes=row.peak_allocated_bytes,
        peak_reserved_bytes=row.peak_reserved_bytes,
    )
