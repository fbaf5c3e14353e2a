"""`TimeEstimate` of one plan and `TimeTable` of many: seconds of one optimizer step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
COMPONENTS = (
    "compute_s", "recompute_s", "communication_s", "optimizer_s", "offload_s", "launch_s",
    "overhead_s",
)  # fmt: skip
"""The parts a step is the sum of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ColdStart:
    """What a run pays once, such as the compilation of its layers."""

    seconds: float
    run_steps: int
    """Optimizer steps of the planned run."""

    @property
    def per_step_s(self) -> float:
        """Seconds a step, spread over the run."""
        return self.seconds / self.run_steps


NO_COLD_START = ColdStart(seconds=0.0, run_steps=1)
"""Of a run that compiles nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeEstimate:
    """Predicted seconds of one optimizer step, by what the slowest rank waits for."""

    compute_s: float
    """Forward and backward, without recomputation."""
    recompute_s: float
    communication_s: float
    """Communication that computation does not hide."""
    optimizer_s: float
    """Clipping and optimizer step, on the device or on the host."""
    offload_s: float
    """Transfers between device and host that computation does not hide."""
    launch_s: float
    """What starting kernels adds where the device waits for the host."""
    overhead_s: float = 0.0
    """The training loop's own work, the engine's copies, compilation spread over the run."""
    hidden_communication_s: float
    """Communication under computation; not part of the step."""
    tokens_per_step: int
    num_ranks: int
    model_flops_per_step: float
    """Useful FLOPs of all ranks: no recomputation."""
    peak_flops: float
    """Of one rank."""

    @property
    def step_s(self) -> float:
        """Seconds of one optimizer step."""
        return sum(self.components.values())

    @property
    def components(self) -> dict[str, float]:
        """The parts `step_s` is the sum of."""
        return {name: getattr(self, name) for name in COMPONENTS}

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all ranks a second."""
        return self.tokens_per_step / self.step_s

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation (Chowdhery et al., PaLM, arXiv:2204.02311, appendix B)."""
        return self.model_flops_per_step / (self.step_s * self.peak_flops * self.num_ranks)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "step_s": self.step_s,
            "tokens_per_s": self.tokens_per_s,
            "tokens_per_s_per_gpu": self.tokens_per_s / self.num_ranks,
            "mfu": self.mfu,
            "components": self.components,
        }


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TimeTable:
    """What `estimate_time` says of each plan, in their order; every array is ``[plans]``."""

    compute_s: Array
    recompute_s: Array
    communication_s: Array
    optimizer_s: Array
    offload_s: Array
    launch_s: Array
    overhead_s: Array
    hidden_communication_s: Array
    num_ranks: Array
    tokens_per_step: int
    model_flops_per_step: float
    peak_flops: float

    def __len__(self) -> int:
        return len(self.compute_s)

    @property
    def step_s(self) -> Array:
        """Seconds of one optimizer step of each plan."""
        return np.asarray(sum(getattr(self, name) for name in COMPONENTS), float)

    def estimate(self, position: int) -> TimeEstimate:
        """Return one plan's row as an object."""
        parts = {name: float(getattr(self, name)[position]) for name in COMPONENTS}
        return TimeEstimate(
            **parts,
            hidden_communication_s=float(self.hidden_communication_s[position]),
            tokens_per_step=self.tokens_per_step,
            num_ranks=int(self.num_ranks[position]),
            model_flops_per_step=self.model_flops_per_step,
            peak_flops=self.peak_flops,
        )
