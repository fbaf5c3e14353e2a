"""`Plan`: one fully decided training configuration."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import Any


class Engine(StrEnum):
    """The library that shards the model states."""

    DDP = "ddp"
    DEEPSPEED = "deepspeed"
    FSDP2 = "fsdp2"


class Recompute(StrEnum):
    """What the backward pass computes again instead of keeping."""

    NONE = "none"
    FULL = "full"


class CpBackend(StrEnum):
    """How the ranks of a sequence attend to all of it."""

    ULYSSES = "ulysses"
    """Tokens are swapped for heads, so the degree must divide both numbers of heads."""
    RING = "ring"
    """Keys and values travel from rank to rank (ring-flash-attn)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One fully decided configuration; what a trial measures and `train` runs.

    The ranks form a mesh ``dp_replicate x dp_shard x cp x tp``. Model states are sharded over
    ``dp_shard * cp`` ranks (sequence-parallel ranks hold different shards) and replicated
    ``dp_replicate`` times. DDP has ``dp_shard == 1``.
    """

    strategy: str
    """Name of the file in ``strategies/`` this plan was made from."""
    engine: Engine
    zero_stage: int = 0
    """DeepSpeed only: 1 to 3."""
    reshard_after_forward: bool = True
    """FSDP2 only: free the gathered parameters between forward and backward."""
    offload_optimizer: bool = False
    offload_params: bool = False
    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1
    cp: int = 1
    """Sequence-parallel degree: each rank holds ``seq_len / cp`` tokens of a sequence."""
    cp_backend: CpBackend = CpBackend.ULYSSES
    """What makes attention see the whole sequence; ULYSSES where ``cp == 1``."""
    heads_k_stride: int = 1
    """Ring over packed sequences only: key-value heads gathered at a time."""
    micro_batch_size: int = 1
    """Sequences per data-parallel group and micro-step."""
    grad_accum_steps: int = 1
    recompute: Recompute = Recompute.NONE
    bucket_elements: int = 0
    """DeepSpeed's reduce, all-gather and prefetch buckets, in elements; 0 means hidden squared.

    DeepSpeed's own default of 5e8 elements would swamp a small model's memory and make two
    strategies differ by a setting nobody chose.
    """
    hpz: int = 1
    """ZeRO-3 only: ranks next to one another that hold a second copy of the parameters between them
    from a step's first forward on (ZeRO++ hpZ), so that later gathers stay among them; 1: none."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.dp_replicate * self.dp_shard * self.cp * self.tp

    @property
    def data_parallel_size(self) -> int:
        """Number of groups that read different sequences."""
        return self.dp_replicate * self.dp_shard

    @property
    def shard_size(self) -> int:
        """Number of ranks one copy of the model states is spread over."""
        return self.dp_shard * self.cp

    @property
    def global_batch_size(self) -> int:
        """Sequences per optimizer step."""
        return self.data_parallel_size * self.micro_batch_size * self.grad_accum_steps

    @property
    def id(self) -> str:
        """Hash of the canonical JSON: equal plans have equal ids, on every machine.

        Fields younger than the first records count only where they differ from their default, so
        a plan keeps its id.
        """
        return _digest(self)

    @property
    def family_id(self) -> str:
        """Id shared by the plans that differ only in micro batch and accumulation.

        One launch measures a whole family: its ladder of micro batches.
        """
        return _digest(replace(self, micro_batch_size=1, grad_accum_steps=1))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; `from_dict` reads them back."""
        values = ((name, getattr(self, name)) for name in _FIELDS)  # asdict is 20 times slower
        return {
            name: str(v) if isinstance(v, StrEnum) else v
            for name, v in values
            if name not in _LATER or v != _LATER[name]
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Plan:
        """Read what `to_dict` wrote.

        Raises:
            TypeError: an unknown field.
            ValueError: an unknown engine, recompute mode or sequence-parallel backend.
        """
        known = dict(values)
        known["engine"] = Engine(known["engine"])
        known["recompute"] = Recompute(known.get("recompute", Recompute.NONE))
        known["cp_backend"] = CpBackend(known.get("cp_backend", CpBackend.ULYSSES))
        return cls(**known)

    @property
    def split_words(self) -> list[str]:
        """Tensor and sequence parallelism as words of a name; none without."""
        words = [f"tp={self.tp}"] if self.tp > 1 else []
        if self.cp > 1:
            words += [f"cp={self.cp}", *(["ring"] if self.cp_backend is CpBackend.RING else [])]
        if self.heads_k_stride > 1:
            words.append(f"heads_k_stride={self.heads_k_stride}")
        return words

    def describe(self) -> str:
        """Return a short human name, such as ``zero2 cp=2 mbs=4 x ga=8 recompute``."""
        words = [self.strategy, *self.split_words]
        words.append(f"mbs={self.micro_batch_size} x ga={self.grad_accum_steps}")
        if self.recompute is not Recompute.NONE:
            words.append("recompute")
        return " ".join(words)


_LATER: dict[str, Any] = {"hpz": 1}
"""Fields that recorded plans lack, and what they mean there: so that their ids stay the same."""
_FIELDS = tuple(field.name for field in fields(Plan))
_YOUNGER = {field.name: field.default for field in fields(Plan)
            if field.name in ("cp_backend", "heads_k_stride")}  # fmt: skip


def _digest(plan: Plan) -> str:
    values = plan.to_dict()
    for name, default in _YOUNGER.items():
        if values[name] == default:
            del values[name]
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]
