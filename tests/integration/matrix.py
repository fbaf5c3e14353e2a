"""Every strategy x adapter x attention x layout on 2 and 4 ranks; a few that cover all pairs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, product

from autotune.plan import CpBackend, Plan, Recompute
from autotune.planner import make_plan
from autotune.rules import check_plan, check_strategy
from autotune.spec.hardware import HardwareSpec, detect_hardware
from autotune.spec.model import ModelSpec, model_from_config
from autotune.spec.strategy import load_strategies
from autotune.spec.workload import Lora, Precision, Workload
from tests.integration.ranks import small_config

GLOBAL_BATCH = 8
STRATEGIES = {strategy.name: strategy for strategy in load_strategies()}
MODEL: ModelSpec = model_from_config("small", small_config())


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One combination."""

    strategy: str
    adapter: str
    attention: str
    """`packed` (a mask of documents) or `plain` (causal)."""
    world: int
    cp: int
    backend: str
    """Of the split of sequences; `ulysses` where there is none."""
    recompute: str
    tp: int = 1

    @property
    def name(self) -> str:
        return (
            f"{self.strategy}-{self.adapter}-{self.attention}-{self.world}r-cp{self.cp}"
            f"{'-ring' * (self.backend == 'ring')}{f'-tp{self.tp}' if self.tp > 1 else ''}"
            f"-{self.recompute}"
        )

    @property
    def workload(self) -> Workload:
        adapter = Lora(r=4, alpha=8, target_modules=tuple(MODEL.linears))
        return Workload(
            seq_len=64,
            global_batch_size=GLOBAL_BATCH,
            precision=Precision.FP32,
            optimizer="sgd",
            packing=self.attention == "packed",
            adapter=adapter if self.adapter == "lora" else None,
        )

    @property
    def hardware(self) -> HardwareSpec:
        return detect_hardware(self.world, "cpu")

    @property
    def plan(self) -> Plan:
        strategy = STRATEGIES[self.strategy]
        split = {"tp": self.tp, "cp": self.cp, "cp_backend": CpBackend(self.backend)}
        recompute = Recompute(self.recompute)
        layout = make_plan(strategy, self.hardware, recompute=recompute, **split)
        # Two micro-steps where the ranks leave room for them.
        steps = GLOBAL_BATCH // max(1, layout.data_parallel_size)
        accumulated = 2 if steps % 2 == 0 else 1
        return make_plan(
            strategy,
            self.hardware,
            recompute=recompute,
            micro_batch_size=steps // accumulated,
            grad_accum_steps=accumulated,
            **split,
        )

    def broken(self) -> list[str]:
        """Return the codes of the rules it breaks."""
        found = check_plan(self.plan, MODEL, self.workload, self.hardware)
        found += check_strategy(STRATEGIES[self.strategy], self.workload, self.cp)
        return [violation.code for violation in found]

    def traits(self) -> tuple[object, ...]:
        """Return what the pairs are made of: what shards, and each of the other choices."""
        shards = self.strategy.replace("zero1", "zero12").replace("zero2", "zero12")
        engine = shards.partition("_")[0]
        split = (self.cp, self.backend)
        return engine, self.adapter, self.attention, self.world, split, self.recompute, self.tp


def every_case(
    cp_degrees: Iterable[int] = (1, 2, 4), tp_degrees: Iterable[int] = (1, 2)
) -> list[Case]:
    """Return all combinations, the illegal ones too."""
    return [
        Case(
            strategy=strategy, adapter=adapter, attention=attention, world=world, cp=cp,
            backend=backend, recompute=recompute, tp=tp,
        )
        for strategy, adapter, attention, world, cp, backend, recompute, tp in product(
            STRATEGIES, ("none", "lora"), ("plain", "packed"), (2, 4), cp_degrees,
            CpBackend, ("none", "full"), tp_degrees,
        )
        if (cp > 1 or backend == CpBackend.ULYSSES) and (tp == 1 or cp <= 2)
    ]  # fmt: skip


def pairs_of(case: Case) -> set[tuple[tuple[int, object], tuple[int, object]]]:
    """Return every pair of a case's traits."""
    first, second = list(enumerate(case.traits())), 2
    return {(a, b) for a, b in combinations(first, second)}


def covering(cases: Sequence[Case]) -> list[Case]:
    """Return few cases in which every pair of traits occurs that occurs at all.

    Greedy, and the same on every machine: the case with most new pairs comes next; among equal ones
    that of the strategy taken least, then of the fewest ranks, then the first.
    """
    left = set().union(*(pairs_of(case) for case in cases))
    chosen: list[Case] = []
    while left:
        taken = [case.strategy for case in chosen]
        best = max(
            cases,
            key=lambda case: (
                len(pairs_of(case) & left), -taken.count(case.strategy), -case.world,
                -cases.index(case),
            ),
        )  # fmt: skip
        chosen.append(best)
        left -= pairs_of(best)
    return chosen
