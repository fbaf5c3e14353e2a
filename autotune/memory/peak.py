"""`Peak`: how much of a device a run needs, with its uncertainty; what verdicts are made of."""

from __future__ import annotations

import math
from dataclasses import dataclass

from autotune.memory.residuals import Residual


@dataclass(frozen=True, kw_only=True, slots=True)
class Peak:
    """The rank that needs most, without its components."""

    total_bytes: int
    """By the formulas, framework included."""
    framework_bytes: int
    """What a process takes outside the allocator."""
    host_bytes: int
    """Of one rank, in host memory."""
    gather_host_bytes: int
    """On the first rank's host while the weights are gathered to be saved."""
    residual: Residual
    """Of log(real / predicted), of `measurable_bytes`."""

    @property
    def measurable_bytes(self) -> int:
        """What a trial measures: the allocator's share on CUDA, all of it on CPU ranks."""
        return self.total_bytes - self.framework_bytes

    @property
    def expected_bytes(self) -> int:
        """`total_bytes`, corrected by what runs measured; the same where none did."""
        return self._at(math.exp(self.residual.bias))

    @property
    def interval_bytes(self) -> tuple[int, int]:
        """90% interval of what a run takes."""
        low, high = self.residual.interval
        return self._at(low), self._at(high)

    def node_host_bytes(self, gpus_per_node: int) -> int:
        """Return what the first node's host needs: its ranks' parts and the gathered weights."""
        return self.host_bytes * gpus_per_node + self.gather_host_bytes

    def _at(self, ratio: float) -> int:
        return self.framework_bytes + int(self.measurable_bytes * ratio)
