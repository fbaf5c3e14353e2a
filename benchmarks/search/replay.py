"""Replay searches on a landscape: one sampler, one seed, every answer by the time it came."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import optuna
from landscape import Landscape, exhaustive_arms
from simulated import MemoryStore, ReplayBench, counted_steps

from autotune.memory.fingerprint import Fingerprint
from autotune.plan import Plan
from autotune.search.asker import Asker
from autotune.search.bench import Launch
from autotune.search.book import Book
from autotune.search.learning import Learner
from autotune.search.loop import Loop
from autotune.search.policy import Asked
from autotune.search.samplers import NamedSampler, make_sampler
from autotune.search.space import Family
from autotune.trial.protocol import Measurement, Outcome
from autotune.trial.record import TrialRecord

MEASUREMENT = Measurement(target_seconds=1.0)
"""Short rungs: what recordings hold is a handful of steps."""
SAMPLERS = (
    "cost-model", "cost-model+formulas", "tpe", "tpe+rungs", "tpe+planner", "gp",
    "random", "grid", "deepspeed-autotuning",
)  # fmt: skip
"""With ``+planner`` the planner's three best families come first; ``tpe`` is Optuna's alone, which
measures whole ladders, with ``+rungs`` the rung it names alone. ``+formulas`` predicts without the
sweep of the machine, which the others' planner has for nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """From `spent_s` on, the search would answer a plan of this regret."""

    spent_s: float
    regret: float
    gap: float
    """Regret that counts differences within the noise, too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Replayed:
    """One search, replayed to its own end, or to its limit of time."""

    landscape: str
    sampler: str
    seed: int
    steps: tuple[Step, ...]
    spent_s: float
    launches: int
    most_launches_an_arm: int
    records: int
    because: str

    def regret_at(self, spent_s: float) -> float:
        """Return the regret of what it would answer then; 1 before it has any answer."""
        before = [step.regret for step in self.steps if step.spent_s <= spent_s]
        return before[-1] if before else 1.0

    def gap_at(self, spent_s: float) -> float:
        """Return the same without leaving out what lies within the noise."""
        before = [step.gap for step in self.steps if step.spent_s <= spent_s]
        return before[-1] if before else 1.0

    def area(self, until_s: float) -> float:
        """Return the mean regret over linear time from 0 to `until_s`; 1 before an answer."""
        total, since, regret = 0.0, 0.0, 1.0
        for step in self.steps:
            at = min(step.spent_s, until_s)
            total += regret * (at - since)
            since, regret = at, step.regret
        return (total + regret * max(0.0, until_s - since)) / until_s


@dataclass(slots=True)
class _UntilSpent:
    bench: ReplayBench
    until_s: float

    def time_spent(self) -> str | None:
        return "the horizon is reached" if self.bench.spent_s >= self.until_s else None

    def launches_spent(self, under_way: int) -> str | None:
        return None


class _Watch:
    """Notes the answer after every record: the fastest that ran, as the search's report has it."""

    def __init__(self, bench: ReplayBench, landscape: Landscape) -> None:
        self._bench, self._landscape = bench, landscape
        self.steps: list[Step] = []
        self.families: list[str] = []
        self.best: TrialRecord | None = None

    def opened(self, launch: Launch, asked: Asked) -> None:
        self.families.append(asked.family.name)

    def closed(self, launch: Launch) -> None: ...

    def measured(self, record: TrialRecord) -> None:
        faster = self.best is None or (record.tokens_per_s or 0) > (self.best.tokens_per_s or 0)
        if record.outcome is Outcome.OK and faster:
            self.best = record
            regret = self._landscape.regret(record.plan_id)
            gap = self._landscape.gap(record.plan_id)
            self.steps.append(Step(spent_s=self._bench.spent_s, regret=regret, gap=gap))


def replay(landscape: Landscape, sampler: str, *, seed: int, until_s: float) -> Replayed:
    """Search a landscape as `autotune search` would, on recorded measurements."""
    bench = ReplayBench(landscape, seed=seed, measurement=MEASUREMENT)
    families = landscape.by_formulas if sampler.endswith("+formulas") else landscape.families
    book = Book(families, MemoryStore(), learner_of(landscape))
    asker = Asker(
        optuna.storages.InMemoryStorage(), families, named(families, sampler, seed), seed=seed
    )
    asker.recover([])
    watch = _Watch(bench, landscape)
    because = Loop(bench, asker, book, _UntilSpent(bench, until_s), watch).run()
    return Replayed(
        landscape=landscape.name,
        sampler=sampler,
        seed=seed,
        steps=tuple(watch.steps),
        spent_s=bench.spent_s,
        launches=bench.num_launches,
        most_launches_an_arm=max(Counter(watch.families).values(), default=0),
        records=len(book.store.all()),
        because=because,
    )


def named(families: Sequence[Family], sampler: str, seed: int) -> NamedSampler:
    base, _, variant = sampler.partition("+")
    made = make_sampler(base, families, seed=seed, measurement=MEASUREMENT)
    return NamedSampler(
        name=sampler,
        sampler=made.sampler,
        rung_by_rung=made.rung_by_rung or variant == "rungs",
        first_families=3 if variant == "planner" else 0,
    )


def learner_of(landscape: Landscape) -> Learner:
    """Return the memory learner of a search that starts without a knowledge base."""
    nowhere = Fingerprint(
        gpu=landscape.name, gpu_memory_bytes=landscape.hardware.gpu.memory_bytes, num_gpus=0,
        driver="", libraries="", estimator="",
    )  # fmt: skip
    return Learner(landscape.model, landscape.workload, landscape.hardware, nowhere, None)


def exhaustive_s(landscape: Landscape) -> float:
    """Return what measuring every point once takes by the same means: a ladder a launch."""
    total = 0.0
    for arm in exhaustive_arms(landscape):
        total += statistics.mean(landscape.ready_s(arm[0]))
        total += sum(point_s(landscape, plan) for plan in arm)
    return total


def one_launch_each_s(landscape: Landscape, *, cold: bool) -> float:
    """Return what it takes with a launch for every point: from a cold start, or forked."""
    total = 0.0
    for arm in exhaustive_arms(landscape):
        for plan in arm:
            start = landscape.cold_s(plan) if cold else statistics.mean(landscape.ready_s(plan))
            total += start + point_s(landscape, plan)
    return total


def point_s(landscape: Landscape, plan: Plan) -> float:
    """Return what one rung takes, in the mean of its recorded rows."""
    costs = [
        row.warmup_s + sum(counted_steps(row, MEASUREMENT)) if row.ran else row.rung_wall_s
        for row in landscape.rows[plan.id]
    ]
    return statistics.mean(costs)


def curve(searches: Sequence[Replayed], times_s: Sequence[float]) -> list[list[float]]:
    """Return every search's regret at each time, shape (times, searches)."""
    return [[search.regret_at(at) for search in searches] for at in times_s]
