"""What each engine sends between ranks, when, and in how many pieces.

Sources: PyTorch 2.13 (`torch/distributed/fsdp/_fully_shard`, DDP's reducer), DeepSpeed 0.19.8
(`runtime/zero/stage_1_and_2.py`, `stage3.py`, `bf16_optimizer.py`, `engine.allreduce_gradients`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from autotune.memory.activations import FP32, compute_bytes
from autotune.plan import CpBackend, Engine, Plan, Recompute
from autotune.spec.model import ModelSpec
from autotune.spec.workload import Workload
from autotune.timing.calibration import Collective
from autotune.timing.links import Links

Array = NDArray[np.float64]

_DDP_BUCKET_BYTES = 25 * 2**20  # DistributedDataParallel's `bucket_cap_mb`
_ZERO1_BUFFER_ELEMENTS = 5e8  # MEMORY_OPT_ALLREDUCE_SIZE
_ZERO3_REUSE_ELEMENTS = 1e9  # `stage3_max_reuse_distance` in emit/deepspeed.py


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Traffic:
    """Seconds of communication, ``[plans]``, and what it may hide under."""

    forward: Array
    """Each micro-step, under forward."""
    backward: Array
    """Each micro-step, under backward."""
    blocking: Array
    """Each micro-step, nothing to hide under."""
    once_overlapped: Array
    """Once a step, under the last backward."""
    once: Array
    """Once a step, nothing to hide under."""


def traffic_of(
    model: ModelSpec, workload: Workload, plan: Plan, numbers: Array, links: Links
) -> Traffic:
    """Return the traffic of plans that are like `plan` but for their numbers."""
    batch, _, replicas, shards, cp, buckets = numbers.T
    tp = plan.tp
    zero = np.zeros(len(numbers))
    width = compute_bytes(workload.precision)
    added = model.num_adapter_parameters(workload.adapter) if workload.adapter else 0
    total = model.num_parameters + added
    trainable = added or total
    layers = model.num_layers
    group = shards * cp

    # One bucket holds whole parameters; a parameter above it goes alone.
    bucket = np.where(buckets > 0, buckets, float(model.hidden_size**2))
    pieces = np.clip(trainable / bucket, layers, layers * (len(model.linears) + 1))

    def gather(elements: float, calls: Array | int = layers) -> Array:
        return links.seconds(Collective.ALL_GATHER, width * elements, group, calls=calls, stride=tp)

    def scatter(calls: Array | int = layers) -> Array:
        return links.seconds(
            Collective.REDUCE_SCATTER, FP32 * trainable, group, calls=calls, stride=tp
        )

    forward = backward = once_overlapped = once = zero
    match plan.engine:
        case Engine.DDP:
            once_overlapped = links.seconds(
                Collective.ALL_REDUCE, FP32 * trainable, replicas * cp,
                calls=max(1, FP32 * trainable / _DDP_BUCKET_BYTES),
            )  # fmt: skip
        case Engine.DEEPSPEED if plan.zero_stage == 1:
            # `buffered_allreduce_fallback`: all-reduced whole at the accumulation boundary, after
            # backward, in flat copies of the two groups (decayed or not).
            calls = max(2, trainable / _ZERO1_BUFFER_ELEMENTS)
            once = links.seconds(Collective.ALL_REDUCE, FP32 * trainable, group, calls=calls)
            once = once + gather(trainable, 2)
        case Engine.DEEPSPEED if plan.zero_stage == 2:
            # Every micro-step all-reduces the buckets, and the owner keeps its part
            # (`allreduce_and_scatter`, as `use_multi_rank_bucket_allreduce` defaults to).
            backward = links.seconds(Collective.ALL_REDUCE, FP32 * trainable, group, calls=pieces)
            once = gather(trainable, 2)
        case Engine.DEEPSPEED:
            # What is used again within `stage3_max_reuse_distance` stays: half of it on each side
            # of the turn from forward to backward.
            again = max(0.0, total - _ZERO3_REUSE_ELEMENTS / 2)
            forward = gather(total, pieces)
            regather = gather(again, pieces) if again else zero
            if plan.hpz > 1:
                # From the first forward on every gather reads the second copy, among `hpz` ranks.
                near = partial(links.seconds, Collective.ALL_GATHER, calls=pieces)
                inside = np.full(len(numbers), float(plan.hpz))
                steps = numbers[:, 1]
                forward = (forward + (steps - 1) * near(width * total, inside)) / steps
                regather = near(width * again, inside) if again else zero
            backward = scatter(pieces) + regather
        case Engine.FSDP2:
            forward = gather(total)
            backward = forward if plan.reshard_after_forward else zero
            copies = links.seconds(
                Collective.ALL_REDUCE, FP32 * trainable / group, replicas, calls=layers,
                stride=group * tp,
            )  # fmt: skip
            once_overlapped = scatter() + copies
    return Traffic(
        forward=forward,
        backward=backward,
        blocking=_sequence_exchange(model, workload, plan, batch, cp, links)
        + _tensor_sums(model, workload, plan, batch, cp, links),
        once_overlapped=once_overlapped,
        once=once,
    )


def _tensor_sums(
    model: ModelSpec, workload: Workload, plan: Plan, batch: Array, cp: Array, links: Links
) -> Array:
    """Sums over the tensor-parallel ranks, of the hidden states but for the logits.

    A layer sums twice in forward and twice in backward (Shoeybi et al., arXiv:1909.08053), and
    twice more where it is recomputed; the embedding once in forward, the head once in backward,
    and the head gathers the logits.
    """
    if plan.tp == 1:
        return np.zeros(len(cp))
    tokens = batch * workload.seq_len / cp
    width = compute_bytes(workload.precision)
    sums = (6 if plan.recompute is Recompute.FULL else 4) * model.num_layers + 2
    hidden = sums * width * tokens * model.hidden_size
    logits = width * tokens * model.vocab_size * plan.tp
    ranks = np.full(len(cp), float(plan.tp))
    summed = links.seconds(Collective.ALL_REDUCE, hidden, ranks, calls=sums)
    return summed + links.seconds(Collective.ALL_GATHER, logits, ranks)


def _sequence_exchange(
    model: ModelSpec, workload: Workload, plan: Plan, batch: Array, cp: Array, links: Links
) -> Array:
    """Ulysses: all-to-all of q, k, v before attention and of its output after, in each pass."""
    if (cp == 1).all():
        return np.zeros(len(cp))
    tokens = batch * workload.seq_len / cp
    width = compute_bytes(workload.precision)
    if plan.cp_backend is CpBackend.RING:
        one_layer = _ring_layer(model, workload, plan, tokens, batch, cp, links)
        return np.where(cp > 1, model.num_layers * one_layer, 0.0)
    elements = tokens * (2 * model.query_size + 2 * model.kv_size)
    passes = 3 if plan.recompute is Recompute.FULL else 2
    one_layer = links.seconds(Collective.ALL_TO_ALL, width * elements, cp, calls=4, stride=plan.tp)
    return passes * model.num_layers * one_layer


def _ring_layer(
    model: ModelSpec,
    workload: Workload,
    plan: Plan,
    tokens: Array,
    batch: Array,
    cp: Array,
    links: Links,
) -> Array:
    """Return what one layer's ring sends in a micro-step, `autotune.runner.ring`.

    Plain: keys and values take ``cp - 1`` hops in each pass, and in backward the fp32 sums of their
    gradients `cp` hops. The package waits for a hop after the block it runs beside; how much of it
    hides there is not known here, so none of it does. Packed: both are gathered in each pass, and
    their gradients reduced in backward, `heads_k_stride` heads and one sequence at a time.
    """
    width = compute_bytes(workload.precision)
    forwards = 2 if plan.recompute is Recompute.FULL else 1
    both = 2 * tokens * model.kv_size
    if workload.packing:
        calls = 2 * batch * model.num_kv_heads / plan.heads_k_stride
        whole = width * both * cp
        gathered = links.seconds(Collective.ALL_GATHER, whole, cp, calls=calls)
        reduced = links.seconds(Collective.REDUCE_SCATTER, whole, cp, calls=calls)
        return (forwards + 1) * gathered + reduced
    # Between nodes where the ring leaves one: every hop waits for the slowest.
    per_node = links.hardware.gpus_per_node
    stride = np.where(cp > per_node, per_node, 1)

    def hops(count: Array, num_bytes: Array) -> Array:
        calls = 2 * np.maximum(count, 1)  # keys and values are sent apart
        return links.seconds(
            Collective.POINT_TO_POINT, count * num_bytes, np.minimum(cp, 2), calls=calls,
            stride=stride,
        )  # fmt: skip

    return (forwards + 1) * hops(cp - 1, width * both) + hops(cp, FP32 * both)
