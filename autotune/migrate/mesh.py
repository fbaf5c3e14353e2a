"""`Mesh`: the copies and shards that FSDP1's hybrid strategies took from the nodes themselves."""

from __future__ import annotations

from dataclasses import dataclass

from autotune.errors import AutotuneError


@dataclass(frozen=True, kw_only=True, slots=True)
class Mesh:
    """All GPUs of a run and the nodes they are in."""

    num_gpus: int
    num_nodes: int

    def __post_init__(self) -> None:
        if self.num_gpus % self.num_nodes:
            raise AutotuneError(
                f"{self.num_gpus} GPUs do not spread evenly over {self.num_nodes} nodes. --gpus is "
                "the number on all nodes together."
            )

    @property
    def dp_replicate(self) -> int:
        """Copies of the model: one a node."""
        return self.num_nodes

    @property
    def dp_shard(self) -> int:
        """Ranks one copy is sharded over: those of a node."""
        return self.num_gpus // self.num_nodes
