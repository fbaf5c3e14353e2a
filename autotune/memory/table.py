"""Many plans at once: the same composition over arrays, a group of alike plans at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autotune.memory.columns import Index, PlanColumns
from autotune.memory.engines import Runs, engine_memory, packed_base
from autotune.memory.moments import Moment, Walk
from autotune.memory.profile import ActivationProfile, features
from autotune.memory.setup import Setup, TraceKey, setup_of
from autotune.memory.sizes import sizes_of
from autotune.memory.tensor_parallel import rank_profiles
from autotune.plan import Plan
from autotune.spec.hardware import HardwareSpec
from autotune.spec.model import ModelSpec
from autotune.spec.model.part import tensor_part
from autotune.spec.workload import Workload
from autotune.units import GIB

Array = NDArray[np.float64]

# The CUDA context with its kernels takes 0.5 to 2 GiB, and NCCL about another 1 GiB after the first
# collective (Bekman, "Machine Learning Engineering Open Book", training/performance). Not
# calibrated here.
CUDA_CONTEXT_BYTES = int(0.6 * GIB)
NCCL_BYTES = 1 * GIB
# Of the allocator's peak, on CPU ranks. Blocks below MALLOC_MMAP_THRESHOLD_=65536 come from glibc's
# heap, which keeps what it once took; larger ones are rounded up to pages. How much that is, no
# source states: at 1.125 of the allocator's peak lay the first failure under RLIMIT_DATA of a model
# of 4 layers. What processes really grew by is learned on top of it (`residuals.json`, ruler
# ``cpu``).
CPU_ALLOCATOR_OVERHEAD = 0.125

_CHUNK = 16384
"""Plans worked on at once: their arrays stay in the processor's cache."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MemoryTable:
    """What `estimate_memory` says of each plan, in their order; bytes."""

    columns: PlanColumns
    total_bytes: Array
    """Peak, framework included."""
    framework_bytes: Array
    """What a process takes outside the allocator."""
    allocator_bytes: Array
    """The part PyTorch's allocator sees."""
    host_bytes: Array
    """Of one rank, in host memory."""
    gather_host_bytes: Array
    """On the first rank's host while the weights are gathered to be saved."""
    peak_instants: tuple[str, ...]
    """Names that `peak_instant` counts in."""
    peak_instant: NDArray[np.int64]


def estimate_memory_table(
    model: ModelSpec,
    workload: Workload,
    plans: Sequence[Plan] | PlanColumns,
    hardware: HardwareSpec,
    *,
    setup: Setup | None = None,
    profile: ActivationProfile | None = None,
) -> MemoryTable:
    """Predict the peak of each of many legal plans; see `estimate_memory`.

    Args:
        model: what is trained.
        workload: on what.
        plans: any number of them.
        hardware: on which devices.
        setup: how; None is how this project's runner trains each plan.
        profile: of the model under the setup's key; None looks it up.
    """
    columns = plans if isinstance(plans, PlanColumns) else PlanColumns.of(plans)
    count = len(columns)
    peak, host, gathered = np.zeros(count), np.zeros(count), np.zeros(count)
    instants: dict[str, int] = {}
    at = np.zeros(count, np.int64)
    groups = list(columns.groups())
    setups = [setup or setup_of(model, workload, plan, hardware) for plan, _ in groups]
    profiles = {} if profile else _profiles(model, groups, setups)
    for (plan, index), own in zip(groups, setups, strict=True):
        walked = profile or profiles[own.key, plan.tp]
        for start in range(0, len(index), _CHUNK):
            rows = index[start : start + _CHUNK]
            numbers = columns.numbers[rows]
            walk = walk_of(model, workload, plan, own, walked, hardware, numbers)
            highest, which = _highest(walk, instants)
            peak[rows] = resting_bytes(walk) + highest
            at[rows] = which
            if not hardware.gpu.is_cpu:
                host[rows] = walk.engine.host()
                gathered[rows] = walk.engine.gather()[1]
    if hardware.gpu.is_cpu:
        framework: Array = np.zeros(count)
        total = peak * (1 + CPU_ALLOCATOR_OVERHEAD)
    else:
        framework = np.asarray(CUDA_CONTEXT_BYTES + NCCL_BYTES * (columns.world_size > 1), float)
        total = peak + framework
    return MemoryTable(
        columns=columns,
        total_bytes=total,
        framework_bytes=framework,
        allocator_bytes=peak,
        host_bytes=host,
        gather_host_bytes=gathered,
        peak_instants=tuple(instants),
        peak_instant=at,
    )


def _profiles(
    model: ModelSpec, groups: list[tuple[Plan, Index]], setups: list[Setup]
) -> dict[tuple[TraceKey, int], ActivationProfile]:
    """Return the profiles of groups of plans, by trace key and tensor-parallel degree."""
    keys: dict[int, list[TraceKey]] = {}
    for (plan, _), setup in zip(groups, setups, strict=True):
        keys.setdefault(plan.tp, []).append(setup.key)
    return {
        (key, tp): profile
        for tp, own in keys.items()
        for key, profile in rank_profiles(model, own, tp).items()
    }


def walk_of(
    model: ModelSpec,
    workload: Workload,
    plan: Plan,
    setup: Setup,
    profile: ActivationProfile,
    hardware: HardwareSpec,
    numbers: Array,
) -> Walk:
    """Return the step of plans that are like `plan` but for their numbers.

    Args:
        model: what is trained.
        workload: on what.
        plan: one of them.
        setup: theirs.
        profile: the model under the setup's key.
        hardware: on which devices.
        numbers: ``[plans, 6]``: micro batch, accumulation, replicas, shards, sequence-parallel
            degree, bucket.
    """
    batch, steps, replicas, shards, cp, bucket = numbers.T
    sizes = sizes_of(tensor_part(model, plan.tp), profile, setup.key.adapter)
    runs = Runs(
        setup=setup,
        on_cpu=hardware.gpu.is_cpu,
        offload_optimizer=plan.offload_optimizer,
        offload_params=plan.offload_params,
        reshard=plan.reshard_after_forward,
        shards=shards * cp,
        world=replicas * shards * cp * plan.tp,
        steps=steps,
        bucket=np.where(bucket > 0, bucket, float(model.hidden_size**2)),
        hpz=plan.hpz,
    )
    base = packed_base(model, setup.quantised, setup.compute_bytes) if setup.quantised else None
    engine = engine_memory(sizes, runs, plan, base)
    return Walk(profile, engine.sizes, engine, features(batch, workload.seq_len, cp))


def numbers_of(plan: Plan) -> Array:
    """Return a plan's row for `walk_of`."""
    return PlanColumns.of([plan]).numbers


def resting_bytes(walk: Walk) -> Array:
    """Return what is there between two steps."""
    return np.asarray(sum(walk.engine.resting().values()), float)


def happens(moment: Moment, steps: Array) -> NDArray[np.bool_] | None:
    """Say for which plans a moment comes; None: for all."""
    return steps > 1 if moment.instant.startswith("later_") else None


def _highest(walk: Walk, instants: dict[str, int]) -> tuple[Array, NDArray[np.int64]]:
    count = len(walk.features)
    highest, which = np.full(count, -1.0), np.zeros(count, np.int64)
    for moment in walk.moments():
        number = instants.setdefault(moment.instant, len(instants))
        total = np.asarray(moment.total, float)
        if total.ndim == 2:
            total = total.max(axis=0)
        above = total > highest
        comes = happens(moment, walk.engine.runs.steps)
        if comes is not None:
            above &= comes
        highest = np.where(above, total, highest)
        which[above] = number
    return highest, which
