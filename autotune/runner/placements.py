"""Where FSDP2 and tensor parallelism must have put each parameter, and which ranks share it."""

from __future__ import annotations

from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from autotune.plan import Plan

_BY_OUTPUTS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
_BY_INPUTS = ("o_proj", "down_proj")


def expected_placements(name: str, plan: Plan) -> tuple[Placement, ...]:
    """Return a parameter's placements on the mesh ``[dp_replicate,] dp_shard * cp[, tp]``.

    Args:
        name: such as ``model.layers.0.self_attn.q_proj.weight``.
        plan: of FSDP2.
    """
    copies: tuple[Placement, ...] = (Replicate(),) if plan.dp_replicate > 1 else ()
    if plan.tp == 1:
        return (*copies, Shard(0))
    along_tp = _along_tp(name)
    # Rows that `tp` has split already FSDP2 splits again: a rank's are no stretch of the whole.
    rows = _StridedShard(0, split_factor=plan.tp) if along_tp == Shard(0) else Shard(0)
    return (*copies, rows, along_tp)


def _along_tp(name: str) -> Placement:
    module, _, parameter = name.rpartition(".")
    module = module.rpartition(".")[2]
    if module in _BY_OUTPUTS:
        return Shard(0)
    # Their bias is added once, to the sum.
    return Shard(1) if module in _BY_INPUTS and parameter == "weight" else Replicate()


def expected_groups(plan: Plan, rank: int) -> dict[str, list[int]]:
    """Return the ranks that must be in each of a rank's groups, in their order.

    The mesh ``dp_replicate x dp_shard x cp x tp`` is laid out row by row: `tp` ranks are
    neighbours.
    """
    model, world = plan.cp * plan.tp, plan.world_size
    copy = plan.shard_size * plan.tp
    groups = {
        "world": list(range(world)),
        "shard": _every(plan.tp, copy, rank),
        "replicate": list(range(rank % copy, world, copy)),
    }
    if plan.cp > 1:
        groups["sequence"] = _every(plan.tp, model, rank)
    if plan.tp > 1:
        groups["tensor-parallel"] = _every(1, plan.tp, rank)
    return groups


def _every(step: int, size: int, rank: int) -> list[int]:
    """Return each `step`-th of the `size` neighbouring ranks that `rank` is one of."""
    first = rank - rank % size
    return list(range(first + rank % step, first + size, step))
