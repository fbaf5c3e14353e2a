"""What each engine holds beside the model's own activations, read from its source."""

from __future__ import annotations

from autotune.memory.engines.base import EngineMemory, Runs
from autotune.memory.engines.ddp import Ddp
from autotune.memory.engines.fsdp2 import Fsdp2
from autotune.memory.engines.zero3 import Zero3
from autotune.memory.engines.zero12 import Zero1, Zero2
from autotune.memory.sizes import Sizes
from autotune.plan import Engine, Plan

__all__ = ["EngineMemory", "Runs", "engine_memory"]


def engine_memory(sizes: Sizes, runs: Runs, plan: Plan) -> EngineMemory:
    """Return the memory of a plan's engine, for all `runs` of it."""
    match plan.engine:
        case Engine.DDP:
            return Ddp(sizes, runs)
        case Engine.FSDP2:
            return Fsdp2(sizes, runs)
        case Engine.DEEPSPEED if plan.zero_stage == 3:
            return Zero3(sizes, runs)
        case Engine.DEEPSPEED if plan.zero_stage == 1 and not plan.offload_optimizer:
            return Zero1(sizes, runs)
        case Engine.DEEPSPEED:
            return Zero2(sizes, runs)
