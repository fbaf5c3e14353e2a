"""`Sharding`: which engine shards what, as `deepspeed:` or `fsdp_config:` says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from autotune.plan import Engine


@dataclass(frozen=True, kw_only=True, slots=True)
class Sharding:
    """The part of a plan that one engine's own configuration decides."""

    engine: Engine
    zero_stage: int = 0
    reshard_after_forward: bool = True
    offload_optimizer: bool = False
    offload_params: bool = False
    bucket_elements: int = 0
    hpz: int = 1
    activation_checkpointing: bool = False
    """FSDP's own switch; it asks for the same recompute as `gradient_checkpointing`."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The engine's own mapping without old spellings, unused keys kept: what is written again."""
    warnings: tuple[str, ...] = field(default=(), compare=False, repr=False)

    def strategy_name(self, dp_replicate: int) -> str:
        """Return the name `strategies/` gives this sharding, or one built by its scheme."""
        if self.engine is Engine.DDP:
            return "ddp"
        if self.engine is Engine.DEEPSPEED:
            offload = {
                (False, False): "",
                (True, False): "_offload_optimizer",
                (True, True): "_offload_params",
                (False, True): "_offload_params_only",
            }[self.offload_optimizer, self.offload_params]
            second = f"_hpz{self.hpz}" if self.hpz > 1 else ""
            return f"zero{self.zero_stage}{second}{offload}"
        name = "hsdp" if dp_replicate > 1 else "fsdp2"
        reshard = "" if self.reshard_after_forward else "_no_reshard"
        return f"{name}{reshard}{'_offload' if self.offload_params else ''}"
