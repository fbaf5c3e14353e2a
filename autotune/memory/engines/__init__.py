"""What each engine holds beside the model's own activations, read from its source."""

from __future__ import annotations

from autotune.memory.engines.base import EngineMemory, Runs
from autotune.memory.engines.ddp import Ddp
from autotune.memory.engines.fsdp2 import Fsdp2
from autotune.memory.engines.packed import (
    PackedBase,
    packed_base,
    packed_sizes,
    with_packed_base,
)
from autotune.memory.engines.zero3 import Zero3
from autotune.memory.engines.zero12 import Zero1, Zero2
from autotune.memory.sizes import Sizes
from autotune.plan import Engine, Plan

__all__ = ["EngineMemory", "Runs", "engine_memory", "packed_base"]


def engine_memory(
    sizes: Sizes, runs: Runs, plan: Plan, base: PackedBase | None = None
) -> EngineMemory:
    """Return the memory of a plan's engine, for all `runs` of it.

    Args:
        sizes: Of the model.
        runs: The plans.
        plan: One of them.
        base: A base in 4 bits, which `sizes` then must not know of.
    """
    kind = _kind(plan)
    if base is None:
        return kind(sizes, runs)
    return with_packed_base(
        kind, packed_sizes(sizes, base, runs.setup.compute_bytes), runs, plan, base
    )


def _kind(plan: Plan) -> type[EngineMemory]:
    match plan.engine:
        case Engine.DDP:
            return Ddp
        case Engine.FSDP2:
            return Fsdp2
        case Engine.DEEPSPEED if plan.zero_stage == 3:
            return Zero3
        case Engine.DEEPSPEED if plan.zero_stage == 1 and not plan.offload_optimizer:
            return Zero1
        case Engine.DEEPSPEED:
            return Zero2
