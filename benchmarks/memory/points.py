"""`Point`: one measured peak and what a tool must know to predict it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from autotune.spec.workload import Lora


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A configuration whose peak somebody measured."""

    id: str
    source: str
    """``ranks`` (this project's runs on CPU ranks) or the published set."""
    config: dict[str, Any]
    """Hugging Face config with ``model_type``."""
    measured_bytes: float | None
    """None: it ran out of memory."""
    metric: str
    """``allocated``, ``reserved`` or ``not stated``."""
    engine: str
    """``single``, ``ddp``, ``zero1`` to ``zero3``, ``fsdp1`` or ``fsdp2``."""
    world_size: int
    shards: int
    """Ranks that one copy of the model states is spread over, where the engine spreads them."""
    precision: str
    """``fp32``; ``mixed`` (fp32 weights or master weights, 16-bit compute) or ``pure`` 16-bit."""
    micro_batch_size: int
    seq_len: int
    grad_accum_steps: int = 1
    checkpointing: bool = False
    flash: bool = True
    lora: Lora | None = None
    quantised: str = ""
    """``nf4``, ``nf4_double``, ``gptq`` or empty."""
    optimizer: str = "adamw"
    offload: bool = False
    gpu: str = ""
    """Name in the GPU catalogue; empty on CPU ranks."""
