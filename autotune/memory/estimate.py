"""`estimate_memory`: the peak of one rank as a maximum over instants of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from autotune.memory.moments import Moment, plain
from autotune.memory.peak import Peak
from autotune.memory.profile import ActivationProfile
from autotune.memory.residuals import Residual, Residuals, ruler_of
from autotune.memory.setup import Setup, setup_of
from autotune.memory.table import (
    CPU_ALLOCATOR_OVERHEAD,
    CUDA_CONTEXT_BYTES,
    NCCL_BYTES,
    happens,
    numbers_of,
    walk_of,
)
from autotune.memory.tensor_parallel import rank_profiles
from autotune.plan import Plan
from autotune.spec.hardware import HardwareSpec
from autotune.spec.model import ModelSpec
from autotune.spec.workload import Workload

COMPONENTS = (
    "parameters", "optimizer", "gradients", "buckets", "offloaded", "gathered_parameters",
    "activations", "logits", "temporaries",
)  # fmt: skip
"""Parts of a rank's memory; beside them the CPU allocator's overhead and the framework's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEstimate:
    """Predicted device memory of the rank that needs most."""

    components: dict[str, int]
    """Bytes at the peak instant; they add up to `total_bytes`."""
    instants: dict[str, int]
    """Bytes at each instant of a step."""
    peak_instant: str
    host_bytes: int
    """Of one rank, in host memory."""
    gather_bytes: int
    """While the weights are gathered to be saved, framework left out; no part of the peak, since a
    trial saves nothing."""
    gather_host_bytes: int
    """Then in host memory, on the first rank alone."""
    activations_from: str
    """Where the model's own tensors are from: ``traced`` or ``closed form``."""
    residual: Residual
    """Of log(real / predicted), of `Peak.measurable_bytes`."""

    @property
    def total_bytes(self) -> int:
        """Peak over the instants, framework included."""
        return sum(self.components.values())

    @property
    def peak(self) -> Peak:
        """The peak without its components."""
        return Peak(
            total_bytes=self.total_bytes,
            framework_bytes=self.components["framework"],
            host_bytes=self.host_bytes,
            gather_host_bytes=self.gather_host_bytes,
            residual=self.residual,
        )

    @property
    def interval_bytes(self) -> tuple[int, int]:
        """90% interval of what a run takes."""
        return self.peak.interval_bytes

    @property
    def expected_bytes(self) -> int:
        """`total_bytes`, corrected by what runs measured; the same where none did."""
        return self.peak.expected_bytes

    @property
    def allocator_bytes(self) -> int:
        """The part PyTorch's allocator sees, comparable with ``max_memory_allocated``."""
        outside = self.components["framework"] + self.components["allocator"]
        return self.total_bytes - outside

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "total_bytes": self.total_bytes,
            "expected_bytes": self.expected_bytes,
            "interval_bytes": list(self.interval_bytes),
            "residual": self.residual.to_dict(),
            "components": dict(self.components),
            "peak_instant": self.peak_instant,
            "instants": dict(self.instants),
            "activations_from": self.activations_from,
            "host_bytes": self.host_bytes,
            "checkpoint_gather_bytes": self.gather_bytes,
            "checkpoint_gather_host_bytes": self.gather_host_bytes,
        }


def estimate_memory(
    model: ModelSpec,
    workload: Workload,
    plan: Plan,
    hardware: HardwareSpec,
    *,
    setup: Setup | None = None,
    profile: ActivationProfile | None = None,
) -> MemoryEstimate:
    """Predict the peak of one rank. The plan must be legal (`rules.check_plan`).

    Args:
        model: what is trained.
        workload: on what.
        plan: how it is laid out.
        hardware: on which devices.
        setup: how it is trained; None is how this project's runner does.
        profile: of the model under the setup's key; None looks it up, or traces it.

    Raises:
        AutotuneError: the model cannot be built or traced.
    """
    setup = setup or setup_of(model, workload, plan, hardware)
    profile = profile or rank_profiles(model, [setup.key], plan.tp)[setup.key]
    walk = walk_of(model, workload, plan, setup, profile, hardware, numbers_of(plan))
    on_cpu = hardware.gpu.is_cpu
    resting = {name: plain(value, 0) for name, value in walk.engine.resting().items()}
    highest: dict[str, dict[str, int]] = {}
    for moment in (one for several in walk.moments() for one in several.instants()):
        comes = happens(moment, walk.engine.runs.steps)
        if comes is None or bool(comes[0]):
            parts = _parts(resting, moment)
            known = highest.get(moment.instant)
            if known is None or sum(parts.values()) > sum(known.values()):
                highest[moment.instant] = parts
    for parts in highest.values():
        parts["allocator"] = int(sum(parts.values()) * CPU_ALLOCATOR_OVERHEAD) if on_cpu else 0
        parts["framework"] = 0 if on_cpu else framework_bytes(plan)
    totals = {name: sum(parts.values()) for name, parts in highest.items()}
    peak = max(totals, key=lambda name: totals[name])
    measurable = totals[peak] - highest[peak]["framework"]
    device, host = walk.engine.gather()
    return MemoryEstimate(
        components=highest[peak],
        instants=totals,
        peak_instant=peak,
        host_bytes=0 if on_cpu else plain(walk.engine.host(), 0),
        gather_bytes=sum(resting.values()) + plain(device, 0) + plain(host, 0) * on_cpu,
        gather_host_bytes=0 if on_cpu else plain(host, 0),
        activations_from=profile.source,
        residual=Residuals.known(ruler_of(on_cpu=on_cpu)).predict(plan, "", measurable),
    )


def framework_bytes(plan: Plan) -> int:
    """Return what a CUDA process takes outside PyTorch's allocator."""
    return CUDA_CONTEXT_BYTES + (NCCL_BYTES if plan.world_size > 1 else 0)


def _parts(resting: dict[str, int], moment: Moment) -> dict[str, int]:
    """Name what is alive at a moment."""
    parts = dict.fromkeys(COMPONENTS, 0) | resting
    parts["gradients"] += plain(moment.work.gradients, 0)
    parts["gathered_parameters"] = plain(moment.work.gathered, 0)
    parts["temporaries"] = plain(moment.work.temporaries, 0)
    parts["activations"] = plain(moment.activations, 0)
    parts["logits"] = plain(moment.logits, 0)
    return parts
