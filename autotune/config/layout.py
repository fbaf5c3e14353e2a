"""`Layout`: the mesh and batch keys of a configuration, and the plan they make on N GPUs."""

from __future__ import annotations

from dataclasses import dataclass

from autotune.config.sharding import Sharding
from autotune.config.values import Section
from autotune.errors import AutotuneError
from autotune.plan import CpBackend, Engine, Plan, Recompute
from autotune.rules import heads_divide
from autotune.spec.model import ModelSpec

RING_FUNCTIONS = {True: "varlen_llama3", False: "batch_ring"}
"""Axolotl's `ring_attn_func` for packed and for plain sequences."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The keys that place ranks and batches; None where the file does not say."""

    micro_batch_size: int
    grad_accum_steps: int
    dp_shard: int | None
    dp_replicate: int | None
    tp: int
    cp: int
    cp_backend: CpBackend
    heads_k_stride: int
    recompute: Recompute


def read_layout(top: Section, where: str, model: ModelSpec) -> Layout:
    """Read the mesh and batch keys of a configuration that trains `model`.

    Raises:
        AutotuneError: a contradiction.
    """
    micro_batch = top.integer("micro_batch_size", 1, minimum=1)
    tp = top.integer("tensor_parallel_size", 1, minimum=1)
    cp = top.integer("context_parallel_size", minimum=1)
    old_cp = top.integer("sequence_parallel_degree", minimum=1)
    if cp is not None and old_cp is not None and cp != old_cp:
        raise AutotuneError(
            f"{where}: context_parallel_size: {cp} and its old name sequence_parallel_degree: "
            f"{old_cp} contradict each other. Keep context_parallel_size."
        )
    cp = cp or old_cp or 1
    backend, heads_k_stride = _read_ring(top, model, cp, tp)
    return Layout(
        micro_batch_size=micro_batch,
        grad_accum_steps=_grad_accum_steps(top, where, micro_batch),
        dp_shard=top.integer("dp_shard_size", minimum=1),
        dp_replicate=top.integer("dp_replicate_size", minimum=1),
        tp=tp,
        cp=cp,
        cp_backend=backend,
        heads_k_stride=heads_k_stride,
        recompute=Recompute.FULL if _checkpointing(top) else Recompute.NONE,
    )


def _read_ring(top: Section, model: ModelSpec, cp: int, tp: int) -> tuple[CpBackend, int]:
    """Return how sequences are split, and the key-value heads gathered at a time.

    A key of the ring asks for it, as do heads that Ulysses cannot split over `cp` of `tp` ranks.
    """
    packed = top.boolean("sample_packing", False)
    function = top.text("ring_attn_func", choices=sorted(RING_FUNCTIONS.values()))
    stride = top.integer("heads_k_stride", minimum=1)
    if cp == 1:
        return CpBackend.ULYSSES, 1
    if packed and function == RING_FUNCTIONS[False]:
        raise top.error("ring_attn_func", "With sample_packing its documents would see one "
                        f"another: write {RING_FUNCTIONS[True]}.")  # fmt: skip
    if function is None and stride is None and heads_divide(model, cp * tp):
        return CpBackend.ULYSSES, 1
    return CpBackend.RING, (stride or 1) if packed else 1


def _grad_accum_steps(top: Section, where: str, micro_batch: int) -> int:
    steps = top.integer("gradient_accumulation_steps", minimum=1)
    batch = top.integer("batch_size", minimum=1)
    if batch is None:
        return steps or 1
    if steps is not None:
        raise AutotuneError(
            f"{where}: batch_size and gradient_accumulation_steps exclude each other. "
            "Keep gradient_accumulation_steps."
        )
    if batch % micro_batch:
        raise top.error("batch_size", f"It must be a multiple of micro_batch_size {micro_batch}.")
    return batch // micro_batch


def _checkpointing(top: Section) -> bool:
    if isinstance(top.raw("gradient_checkpointing"), str):
        raise top.error("gradient_checkpointing", "Write true or false; offloaded activations "
                        "are not run here.")  # fmt: skip
    return top.boolean("gradient_checkpointing", False)


def build_plan(sharding: Sharding, layout: Layout, num_gpus: int, where: str) -> Plan:
    """Lay the configuration out on `num_gpus` ranks.

    Sizes the file does not give are filled from the ranks that remain, as Axolotl does; unlike
    there, a product that misses the number of ranks is an error.

    Raises:
        AutotuneError: the sizes do not multiply to `num_gpus`, or do not fit the engine.
    """
    if num_gpus < 1:
        raise AutotuneError(f"{num_gpus} GPUs: give a number of at least 1.")
    model = layout.cp * layout.tp
    if num_gpus % model:
        sizes = {"context_parallel_size": layout.cp, "tensor_parallel_size": layout.tp}
        given = [f"{key} {size}" for key, size in sizes.items() if size > 1]
        raise AutotuneError(
            f"{where}: [AT102] {' x '.join(given)} does not divide {num_gpus} GPUs. "
            f"{_divisors_hint(num_gpus)}"
        )
    groups = num_gpus // model
    dp_shard, dp_replicate = _data_parallel(sharding, layout, groups, where)
    if dp_shard * dp_replicate != groups:
        raise AutotuneError(
            f"{where}: [AT101] dp_shard_size {dp_shard} x dp_replicate_size {dp_replicate} x "
            f"context_parallel_size {layout.cp} x tensor_parallel_size {layout.tp} = "
            f"{dp_shard * dp_replicate * model}, but there are {num_gpus} GPUs. Make the product "
            "equal, or leave dp_shard_size out."
        )
    recompute = Recompute.FULL if sharding.activation_checkpointing else layout.recompute
    return Plan(
        strategy=sharding.strategy_name(dp_replicate),
        engine=sharding.engine,
        zero_stage=sharding.zero_stage,
        reshard_after_forward=sharding.reshard_after_forward,
        offload_optimizer=sharding.offload_optimizer,
        offload_params=sharding.offload_params,
        dp_replicate=dp_replicate,
        dp_shard=dp_shard,
        tp=layout.tp,
        cp=layout.cp,
        cp_backend=layout.cp_backend,
        heads_k_stride=layout.heads_k_stride,
        micro_batch_size=layout.micro_batch_size,
        grad_accum_steps=layout.grad_accum_steps,
        recompute=recompute,
        bucket_elements=sharding.bucket_elements,
        hpz=sharding.hpz,
    )


def _data_parallel(sharding: Sharding, layout: Layout, groups: int, where: str) -> tuple[int, int]:
    """Return (dp_shard, dp_replicate), filled in where the file gives one or none of them."""
    if sharding.engine is Engine.DDP:
        if (layout.dp_shard or 1) > 1:
            raise AutotuneError(
                f"{where}: dp_shard_size {layout.dp_shard} needs an engine that shards: add "
                "fsdp_version: 2 with fsdp_config, or deepspeed."
            )
        return 1, layout.dp_replicate or groups
    if sharding.engine is Engine.DEEPSPEED:
        if (layout.dp_replicate or 1) > 1:
            raise AutotuneError(
                f"{where}: dp_replicate_size {layout.dp_replicate} with deepspeed: replicated "
                "shards are run with FSDP2 alone. Use fsdp_version: 2 with fsdp_config."
            )
        return layout.dp_shard or groups, 1
    if layout.dp_shard is None:
        replicate = layout.dp_replicate or 1
        return max(groups // replicate, 1), replicate
    return layout.dp_shard, layout.dp_replicate or max(groups // layout.dp_shard, 1)


def _divisors_hint(num_gpus: int) -> str:
    divisors = [str(size) for size in range(1, num_gpus + 1) if num_gpus % size == 0]
    return f"These divide it: {', '.join(divisors)}."
