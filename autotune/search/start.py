"""`Start`: the configuration a search starts from, as one plan of its space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autotune.config.foreign import Loaded
from autotune.plan import Engine, Plan
from autotune.planner import make_plan
from autotune.spec.hardware import HardwareSpec
from autotune.spec.strategy import Replicate, Strategy
from autotune.spec.training import DataSettings, TrainSettings


@dataclass(frozen=True, kw_only=True)
class Start:
    """A configuration read from a file, laid out on the ranks of a search."""

    path: Path
    loaded: Loaded
    plan: Plan
    """Under the name of `strategy`, at the search's own global batch."""
    strategy: Strategy
    """Of `plan`: a shipped one where it shards and places ranks alike."""

    @property
    def train(self) -> TrainSettings:
        """Schedule, clipping and saving, which `best.yml` takes over; never compiled, as trials."""
        return self.loaded.config.train.model_copy(update={"torch_compile": False})

    def left_out(self) -> list[str]:
        """Return the keys of the file that the trials of a search do not follow."""
        config = self.loaded.config
        keys = {
            "torch_compile": config.train.torch_compile,
            "test_datasets": bool(config.test_datasets),
            "train_on_inputs, excess_length_strategy and the like": config.data != DataSettings(),
        }
        return [key for key, given in keys.items() if given]

    def to_dict(self) -> dict[str, Any]:
        """Return what `study.json` holds of it."""
        return {
            "file": str(self.path),
            "format": str(self.loaded.kind),
            "plan_id": self.plan.id,
            "plan": self.plan.to_dict(),
        }


def starting_plan(
    loaded: Loaded,
    path: Path,
    hardware: HardwareSpec,
    global_batch_size: int,
    shipped: Sequence[Strategy],
) -> Start:
    """Lay a configuration out as a plan of a search.

    Its micro batch is kept; the accumulation follows from the global batch. Where that does not
    divide, the accumulation stays the file's and a rule (AT104) says so.

    Args:
        loaded: The file.
        path: Where it lies.
        hardware: Of the search.
        global_batch_size: Sequences an optimizer step, of the search.
        shipped: Strategies whose name it takes where it is one of them.

    Raises:
        AutotuneError: the file's mesh does not fit the number of ranks.
    """
    plan = loaded.config.plan(hardware.num_gpus)
    per_step = plan.data_parallel_size * plan.micro_batch_size
    if global_batch_size % per_step == 0:
        plan = replace(plan, grad_accum_steps=global_batch_size // per_step)
    for strategy in shipped:
        if _laid_out(strategy, plan, hardware) == replace(plan, strategy=strategy.name):
            return Start(
                path=path,
                loaded=loaded,
                plan=replace(plan, strategy=strategy.name),
                strategy=strategy,
            )
    strategy = _own_strategy(plan, path)
    return Start(
        path=path, loaded=loaded, plan=replace(plan, strategy=strategy.name), strategy=strategy
    )


def _laid_out(strategy: Strategy, plan: Plan, hardware: HardwareSpec) -> Plan:
    return make_plan(
        strategy,
        hardware,
        tp=plan.tp,
        cp=plan.cp,
        recompute=plan.recompute,
        micro_batch_size=plan.micro_batch_size,
        grad_accum_steps=plan.grad_accum_steps,
    )


def _own_strategy(plan: Plan, path: Path) -> Strategy:
    """Return the strategy of a plan that no shipped one makes; its name says what differs."""
    name = plan.strategy
    copies = plan.engine is Engine.FSDP2 and plan.dp_replicate > 1
    if copies:
        name += f"_{plan.dp_replicate}_copies"
    if plan.bucket_elements:
        name += f"_bucket_{plan.bucket_elements}"
    replicate = Replicate.ALL if plan.engine is Engine.DDP else Replicate.NONE
    return Strategy(
        name=name,
        summary=f"As {path.name} says.",
        engine=plan.engine,
        zero_stage=plan.zero_stage,  # type: ignore[arg-type]
        reshard_after_forward=plan.reshard_after_forward,
        offload_optimizer=plan.offload_optimizer,
        offload_params=plan.offload_params,
        replicate=Replicate.HYBRID if copies else replicate,
        copies=plan.dp_replicate if copies else None,
        bucket_elements=plan.bucket_elements,
        hpz=plan.hpz,
        supports_sequence_parallel=not copies,
    )
