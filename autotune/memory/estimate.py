"""`estimate_memory`: the peak of one rank as a maximum over instants of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from autotune.memory.activations import Activations, count_activations
from autotune.memory.residuals import Residual, Residuals, ruler_of
from autotune.memory.states import ModelStates, model_states
from autotune.plan import Plan, Recompute
from autotune.spec.hardware import HardwareSpec
from autotune.spec.model import ModelSpec
from autotune.spec.workload import Workload
from autotune.units import GIB

# The CUDA context with its kernels takes 0.5 to 2 GiB, and NCCL about another 1 GiB after the first
# collective (Bekman, "Machine Learning Engineering Open Book", training/performance). Not
# calibrated here.
_CUDA_CONTEXT_BYTES = int(0.6 * GIB)
_NCCL_BYTES = 1 * GIB
# Where glibc's malloc (MALLOC_MMAP_THRESHOLD_=65536) first fails under RLIMIT_DATA, over the
# allocator's own peak: one measurement of a 4-layer model on CPU.
_CPU_ALLOCATOR_OVERHEAD = 0.125


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
    residual: Residual
    """Of log(real / predicted), of `measurable_bytes`."""

    @property
    def total_bytes(self) -> int:
        """Peak over the instants, framework included."""
        return sum(self.components.values())

    @property
    def interval_bytes(self) -> tuple[int, int]:
        """90% interval of what a run takes."""
        low, high = self.residual.interval
        return self._at(low), self._at(high)

    @property
    def expected_bytes(self) -> int:
        """`total_bytes`, corrected by what runs measured; the same where none did."""
        return self._at(math.exp(self.residual.bias))

    @property
    def framework_bytes(self) -> int:
        """What a process takes outside the allocator."""
        return self.components["framework"]

    @property
    def measurable_bytes(self) -> int:
        """What a trial measures: the allocator's share on CUDA, all of it on CPU ranks."""
        return self.total_bytes - self.framework_bytes

    def _at(self, ratio: float) -> int:
        return self.framework_bytes + int(self.measurable_bytes * ratio)

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
            "host_bytes": self.host_bytes,
        }


def estimate_memory(
    model: ModelSpec, workload: Workload, plan: Plan, hardware: HardwareSpec
) -> MemoryEstimate:
    """Predict the peak of one rank. The plan must be legal (`rules.check_plan`)."""
    states = model_states(model, workload, plan, hardware)
    activations = count_activations(model, workload, plan)
    on_cpu = hardware.gpu.is_cpu
    fixed = {
        "parameters": states.parameters,
        "optimizer": states.optimizer,
        "buckets": states.buckets,
        # On CPU ranks "offloaded" states stay in the memory the rank is limited to.
        "offloaded": states.host if on_cpu else 0,
    }
    by_instant: dict[str, dict[str, int]] = {}
    for name, varying in _instants(model, plan, states, activations).items():
        parts = fixed | varying
        used = sum(parts.values())
        parts["allocator"] = int(used * _CPU_ALLOCATOR_OVERHEAD) if on_cpu else 0
        parts["framework"] = 0 if on_cpu else framework_bytes(plan)
        by_instant[name] = parts
    totals = {name: sum(parts.values()) for name, parts in by_instant.items()}
    peak = max(totals, key=lambda name: totals[name])
    measurable = totals[peak] - by_instant[peak]["framework"]
    return MemoryEstimate(
        components=by_instant[peak],
        instants=totals,
        peak_instant=peak,
        host_bytes=0 if on_cpu else states.host,
        residual=Residuals.known(ruler_of(on_cpu=on_cpu)).predict(plan, "", measurable),
    )


def framework_bytes(plan: Plan) -> int:
    """Return what a CUDA process takes outside PyTorch's allocator."""
    return _CUDA_CONTEXT_BYTES + (_NCCL_BYTES if plan.world_size > 1 else 0)


def _instants(
    model: ModelSpec, plan: Plan, states: ModelStates, activations: Activations
) -> dict[str, dict[str, int]]:
    """Compose what varies over a step; a later micro-step adds the gradients accumulated so far."""
    kept = activations.kept(model.num_layers, plan.recompute)
    recomputed = activations.layer if plan.recompute is Recompute.FULL else 0

    def instant(
        *, gradients: int, gathered: int = 0, saved: int = 0, logits: int = 0, cast: int = 0
    ) -> dict[str, int]:
        return {
            "gradients": gradients,
            "gathered_parameters": gathered + cast,
            "activations": saved,
            "logits": logits,
        }

    def micro_step(prefix: str, held: int, at_end: int) -> dict[str, dict[str, int]]:
        return {
            f"{prefix}forward_end": instant(
                gradients=held,
                gathered=states.gathered_forward,
                cast=states.cast_cache,
                saved=kept,
                logits=activations.logits_forward,
            ),
            f"{prefix}loss": instant(
                gradients=held,
                gathered=states.gathered_forward,
                cast=states.cast_cache,
                saved=kept,
                logits=activations.logits_loss,
            ),
            f"{prefix}head_backward": instant(
                gradients=held + states.head_gradient_work,
                gathered=states.gathered_forward,
                cast=states.cast_cache,
                saved=kept,
                logits=activations.logits_gradient,
            ),
            f"{prefix}backward": instant(
                gradients=held + states.layer_gradient_work,
                gathered=states.gathered_backward,
                cast=states.cast_cache,
                saved=kept + recomputed + activations.layer_gradients,
            ),
            f"{prefix}backward_end": instant(
                gradients=at_end + states.end_gradient_work, gathered=states.gathered_end
            ),
        }

    after_first = states.gradients_later if plan.grad_accum_steps > 1 else states.gradients_step
    result = micro_step("", states.gradients_first, after_first)
    if plan.grad_accum_steps > 1:
        at_end = max(states.gradients_later, states.gradients_step)
        result |= micro_step("later_", states.gradients_later, at_end)
    result["optimizer_step"] = instant(gradients=states.gradients_step + states.step_work)
    return result
