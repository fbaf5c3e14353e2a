"""A bench whose speeds follow a rule, for tests of the loop and its samplers; nothing is timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import optuna
from simulated import MemoryStore

from autotune.planner import Estimate, rank_plans
from autotune.search.asker import Asker
from autotune.search.book import Book
from autotune.search.loop import Loop
from autotune.search.policy import Asked
from autotune.search.samplers import make_sampler
from autotune.search.space import Family, make_families
from autotune.spec.hardware import load_hardware
from autotune.spec.model import load_model
from autotune.spec.strategy import load_strategies
from autotune.spec.workload import Workload
from autotune.trial.protocol import Outcome
from autotune.trial.record import TrialRecord

LAUNCH_S, RUNG_S = 10.0, 1.0
Rule = Callable[[Estimate], float | Outcome]
"""Tokens/s of a plan, or how its trial fails."""


def families_of(*strategies: str, global_batch_size: int = 16) -> list[Family]:
    ranking = rank_plans(
        load_model("tiny-qwen3"),
        Workload(seq_len=128, global_batch_size=global_batch_size),
        load_hardware("cpu", 2),
        load_strategies(strategies or ["ddp", "zero1", "zero2", "zero3", "fsdp2"]),
        cp_degrees=[1],
    )
    return make_families(ranking.candidates)[0]


class RuleBench:
    """Charges 10 s a launch and 1 s a rung; refuses what a real launch could not do."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.spent_s = 0.0
        self.launches: list[RuleLaunch] = []
        self.made: list[TrialRecord] = []
        """Every record that `measure` returned."""

    def open(self, family: Family, planned: Sequence[Estimate]) -> RuleLaunch:
        assert planned[0] in family.ladder
        assert all(not launch.open for launch in self.launches), "one launch at a time"
        self.spent_s += LAUNCH_S
        self.launches.append(RuleLaunch(self, family, len(self.launches) + 1))
        return self.launches[-1]

    @property
    def asked(self) -> list[tuple[str, int]]:
        return [(launch.family.name, size) for launch in self.launches for size in launch.sizes]


class RuleLaunch:
    def __init__(self, bench: RuleBench, family: Family, number: int) -> None:
        self.family, self.number = family, number
        self.alive = self.open = True
        self.sizes: list[int] = []
        self._bench = bench

    def measure(
        self, estimate: Estimate, *, give_up_step_s: float | None = None
    ) -> TrialRecord | None:
        size = estimate.plan.micro_batch_size
        assert self.alive and self.open
        assert not self.sizes or size > self.sizes[-1], "a ladder ascends"
        assert estimate.plan.family_id == self.family.ladder[0].plan.family_id
        self.sizes.append(size)
        self._bench.spent_s += RUNG_S
        result = self._bench.rule(estimate)
        failed = isinstance(result, Outcome)
        self.alive = not failed
        record = TrialRecord(
            launch=self.number,
            plan_id=estimate.plan.id,
            outcome=result if isinstance(result, Outcome) else Outcome.OK,
            message="",
            plan=estimate.plan.to_dict(),
            tokens_per_s=None if isinstance(result, Outcome) else result,
        )
        self._bench.made.append(record)
        return record

    def close(self) -> None:
        self.open = False


class Watch:
    def opened(self, launch: object, asked: Asked) -> None: ...
    def measured(self, record: TrialRecord) -> None: ...
    def closed(self, launch: object) -> None: ...


class NoLimits:
    def time_spent(self) -> str | None:
        return None

    def launches_spent(self, under_way: int) -> str | None:
        return None


def search(
    families: Sequence[Family],
    rule: Rule,
    sampler: str = "cost-model",
    *,
    limits: NoLimits | None = None,
    tolerance: float = 0.02,
    seed: int = 0,
) -> tuple[RuleBench, Book, str]:
    """Run a whole search; return its bench, its book and why it stopped."""
    bench, book = RuleBench(rule), Book(families, MemoryStore(), None)
    named = make_sampler(sampler, families, seed=seed, tolerance=tolerance)
    asker = Asker(optuna.storages.InMemoryStorage(), families, named, seed=seed)
    asker.recover([])
    told: list[TrialRecord] = []
    tell = asker.tell

    def noting(family: Family, record: TrialRecord, charge: object) -> None:
        told.append(record)
        tell(family, record, charge)  # type: ignore[arg-type]

    asker.tell = noting  # type: ignore[method-assign]
    because = Loop(bench, asker, book, limits or NoLimits(), Watch()).run()
    assert [id(record) for record in told] == [id(record) for record in bench.made]
    assert [id(record) for record in book.store.all()] == [id(record) for record in bench.made]
    return bench, book, because
