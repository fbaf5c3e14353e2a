"""The plans of a space: every strategy laid out over the hardware, with every micro batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

from autotune.plan import CpBackend, Plan, Recompute
from autotune.rules import heads_divide
from autotune.spec.hardware import HardwareSpec
from autotune.spec.model import ModelSpec
from autotune.spec.strategy import Replicate, Strategy
from autotune.spec.workload import Workload

CP_DEGREES = (1, 2, 4)


def enumerate_plans(
    model: ModelSpec,
    workload: Workload,
    hardware: HardwareSpec,
    strategies: Sequence[Strategy],
    *,
    micro_batches: Sequence[int] | None = None,
    cp_degrees: Sequence[int] = CP_DEGREES,
    cp_backends: Sequence[CpBackend] | None = None,
    tp_degrees: Sequence[int] = (1,),
    recompute: Sequence[Recompute] = (Recompute.NONE, Recompute.FULL),
    also: Sequence[Plan] = (),
) -> list[Plan]:
    """Return every plan of the space, the illegal layouts once each so that a rule can say why.

    The accumulation follows from the exact global batch. Without `micro_batches` the powers of two
    that divide a rank's sequences are taken, and all of them at once (accumulation 1). Without
    `cp_backends` sequences are split by Ulysses, and by the ring where its heads do not divide.
    Tensor parallelism is in the space only where its degrees are asked for.
    The plans `also` come in addition, each of one of the strategies.
    """
    plans = []
    for strategy, tp in product(strategies, tp_degrees):
        for cp, backend in _sequence_splits(model, tp, cp_degrees, cp_backends):
            for mode in recompute:
                layout = make_plan(
                    strategy, hardware, tp=tp, cp=cp, cp_backend=backend, recompute=mode
                )
                plans += _with_batches(layout, workload, micro_batches)
    known = {plan.id for plan in plans} if also else set()
    return plans + [plan for plan in also if plan.id not in known]


def _sequence_splits(
    model: ModelSpec, tp: int, cp_degrees: Sequence[int], cp_backends: Sequence[CpBackend] | None
) -> list[tuple[int, CpBackend]]:
    found = []
    for cp in cp_degrees:
        backends: Sequence[CpBackend] = cp_backends or (
            [CpBackend.ULYSSES if heads_divide(model, cp * tp) else CpBackend.RING]
        )
        found += [(cp, backend) for backend in (backends if cp > 1 else [CpBackend.ULYSSES])]
    return found


def make_plan(
    strategy: Strategy,
    hardware: HardwareSpec,
    *,
    tp: int = 1,
    cp: int = 1,
    cp_backend: CpBackend = CpBackend.ULYSSES,
    recompute: Recompute = Recompute.NONE,
    micro_batch_size: int = 1,
    grad_accum_steps: int = 1,
) -> Plan:
    """Lay a strategy out over the hardware; the result may break a rule."""
    data_parallel = max(1, hardware.num_gpus // (cp * tp))
    match strategy.replicate:
        case Replicate.ALL:
            dp_replicate, dp_shard = data_parallel, 1
        case Replicate.HYBRID:
            dp_replicate = strategy.copies or max(2, hardware.num_nodes)
            dp_shard = max(1, data_parallel // dp_replicate)
        case Replicate.NONE:
            dp_replicate, dp_shard = 1, data_parallel
    return Plan(
        strategy=strategy.name,
        engine=strategy.engine,
        zero_stage=strategy.zero_stage,
        reshard_after_forward=strategy.reshard_after_forward,
        offload_optimizer=strategy.offload_optimizer,
        offload_params=strategy.offload_params,
        dp_replicate=dp_replicate,
        dp_shard=dp_shard,
        tp=tp,
        cp=cp,
        cp_backend=cp_backend,
        micro_batch_size=micro_batch_size,
        grad_accum_steps=grad_accum_steps,
        recompute=recompute,
        bucket_elements=strategy.bucket_elements,
        hpz=strategy.hpz,
    )


def _with_batches(
    layout: Plan, workload: Workload, micro_batches: Sequence[int] | None
) -> list[Plan]:
    per_rank, rest = divmod(workload.global_batch_size, layout.data_parallel_size)
    if rest or not per_rank:
        return [layout]  # the rule on the global batch refuses it
    if micro_batches is None:
        sizes = [2**power for power in range(per_rank.bit_length()) if per_rank % 2**power == 0]
        sizes += [per_rank] if per_rank not in sizes else []
    else:
        sizes = list(micro_batches)
    # A given size that does not divide is kept, so that the rule refuses it by name.
    return [_batch(layout, size, 1 if per_rank % size else per_rank // size) for size in sizes]


def _batch(layout: Plan, micro_batch_size: int, grad_accum_steps: int) -> Plan:
    return replace(layout, micro_batch_size=micro_batch_size, grad_accum_steps=grad_accum_steps)
