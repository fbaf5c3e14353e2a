"""What each engine holds at each place of a step, in numbers small enough to count by hand."""

import numpy as np
import pytest

from autotune.memory.engines import Runs, engine_memory
from autotune.memory.engines.base import Place
from autotune.memory.setup import Optimizer, Regime, Setup, TraceKey
from autotune.memory.sizes import Sizes
from autotune.plan import Engine, Plan

EMBEDDING, NORM, LAYER, LAYERS = 1000, 10, 300, 4
BIG, SMALL = 200, 50
"""A layer's parameters: one of 200 elements, two of 50."""
RANKS = 2


def sizes(*, tied=False, adapter=False):
    head = 0 if tied else EMBEDDING
    trained = 20 if adapter else LAYER
    return Sizes(
        embedding=EMBEDDING, head=head, norm=NORM,
        layers=np.full(LAYERS, LAYER + 20.0 * adapter),
        layers_trainable=np.full(LAYERS, float(trained)),
        root_trainable=0 if adapter else EMBEDDING + head + NORM, module=BIG,
        parameters=(10,) if adapter else (BIG, SMALL),
        counts=(8,) if adapter else (LAYERS, 2 * LAYERS),
    )  # fmt: skip


TOTAL = sizes().total


def make(strategy, *, steps=1, bucket=100, on_cpu=False, ranks=RANKS, size=None, **changes):
    engine, stage = strategy
    deepspeed = engine is Engine.DEEPSPEED
    offload = changes.pop("offload", False)
    setup = Setup(
        key=TraceKey(regime=Regime.COMPUTE), parameter_bytes=2 if deepspeed else 4,
        master_weights=deepspeed, **changes.pop("setup", {}),
    )  # fmt: skip
    sharded = 1 if engine is Engine.DDP else ranks
    runs = Runs(
        setup=setup, on_cpu=on_cpu, offload_optimizer=offload,
        offload_params=offload and stage != 2, reshard=changes.pop("reshard", True),
        shards=np.array([float(sharded)]), world=np.array([float(ranks)]),
        steps=np.array([float(steps)]), bucket=np.array([float(bucket)]),
    )  # fmt: skip
    plan = Plan(strategy="x", engine=engine, zero_stage=stage, offload_optimizer=offload)
    return engine_memory(size or sizes(**changes), runs, plan)


DDP, FSDP2 = (Engine.DDP, 0), (Engine.FSDP2, 0)
ZERO1, ZERO2, ZERO3 = ((Engine.DEEPSPEED, stage) for stage in (1, 2, 3))


def layer(index, *, tied=False):
    size = sizes(tied=tied)
    tail, last = size.head + size.norm, index == LAYERS - 1
    return Place(
        kind="layer", unit=LAYER, unit_trainable=LAYER, before=LAYER if index else EMBEDDING,
        after=tail if last else LAYER, after_trainable=tail if last else LAYER,
        below=EMBEDDING + index * LAYER, above=tail + (LAYERS - 1 - index) * LAYER,
        first=index == 0, finished=tail + (LAYERS - 1 - index) * LAYER,
    )  # fmt: skip


def total(work):
    return float(np.sum(np.asarray(work.gradients + work.gathered + work.temporaries)))


def resting(engine):
    return {name: float(np.asarray(value).sum()) for name, value in engine.resting().items()}


# Rajbhandari et al., arXiv:1910.02054, with fp32 gradients: bytes a parameter.
@pytest.mark.parametrize(
    ("strategy", "kept"),
    [
        (DDP, {"parameters": 4, "optimizer": 8, "buckets": 4}),
        (ZERO1, {"parameters": 2, "optimizer": 12 / RANKS, "gradients": 4}),
        (ZERO2, {"parameters": 2, "optimizer": 12 / RANKS}),
        (ZERO3, {"parameters": 2 / RANKS, "optimizer": 12 / RANKS, "gradients": 4 / RANKS}),
        (FSDP2, {"parameters": 4 / RANKS, "optimizer": 8 / RANKS}),
    ],
)
def test_what_rests_between_steps(strategy, kept):
    found = resting(make(strategy, bucket=0))
    assert {k: v for k, v in found.items() if v} == {k: v * TOTAL for k, v in kept.items()}


def test_one_process_in_a_group_is_wrapped_too():
    assert resting(make(DDP, ranks=1))["buckets"] == 4 * TOTAL


def test_an_optimizer_of_another_kind():
    sgd = make(ZERO2, setup={"optimizer": Optimizer.SGD})
    assert resting(sgd)["optimizer"] == 4 * TOTAL / RANKS  # the master weights
    eight_bit = make(DDP, setup={"optimizer": Optimizer.ADAMW_8BIT})
    assert resting(eight_bit)["optimizer"] == pytest.approx(TOTAL * 2 * (1 + 4 / 256))


def test_an_adapter_alone_is_trained():
    size = sizes(adapter=True)
    assert resting(make(DDP, adapter=True))["optimizer"] == 8 * 80
    assert resting(make(ZERO3, adapter=True, bucket=0))["parameters"] == 2 * size.total / RANKS
    assert total(make(DDP, adapter=True).finish(later=False)) == 4 * 80


def test_ddp_adds_gradients_as_they_come():
    engine = make(DDP)
    assert total(engine.backward(layer(1), 100, later=False)) == 4 * (1010 + 2 * 300 + 100)
    assert total(engine.backward(layer(1), 100, later=True)) == 4 * TOTAL
    # torch steps over one parameter after the other: a root and its quotient.
    assert total(engine.step()) == 4 * TOTAL + 4 * (2 * EMBEDDING + BIG)


def test_zero1_keeps_what_backward_made_until_the_step():
    engine = make(ZERO1, steps=2)
    assert engine.held() == 2 * TOTAL
    # A micro-step that does not reduce casts one gradient at a time; the last one copies them all.
    assert total(engine.finish(later=False)) == 2 * TOTAL + 4 * EMBEDDING
    assert total(engine.finish(later=True)) == 2 * TOTAL + 4 * TOTAL
    assert total(engine.step()) == 2 * TOTAL + 8 * TOTAL / RANKS


def test_zero2_reduces_bucket_by_bucket():
    engine = make(ZERO2)
    part = TOTAL / RANKS
    # Last rank: the head (2 bytes) stays whole; of two layers the large third of what it owns.
    owned = EMBEDDING + min(1010 + 600, part) - EMBEDDING
    large = 2 * (EMBEDDING + (owned - EMBEDDING) * BIG / LAYER)
    before = engine.backward(layer(1), 0, later=False)
    assert before.gradients == 4 * part + large
    # Two buckets (overlap); and the large gradient in fp32 when one arrives.
    assert before.temporaries == 2 * 200
    assert engine.backward(layer(1), BIG, later=False).temporaries == 2 * 200 + 4 * BIG
    wide = make(ZERO2, bucket=400).backward(layer(1), BIG, later=False)
    assert wide.gradients == 4 * part + 2 * EMBEDDING
    assert wide.temporaries == 2 * 800 + 6 * 400
    assert total(engine.step()) == 4 * part + 8 * part


def test_zero2_makes_its_partition_with_the_first_reduction():
    head = Place(
        kind="tail", unit=NORM, unit_trainable=NORM, before=LAYER, after=0, after_trainable=0,
        below=0, above=0, first=False, finished=0,
    )  # fmt: skip
    engine = make(ZERO2, tied=True)
    partition = 4 * sizes(tied=True).total / RANKS
    assert engine.backward(head, NORM, later=False).gradients < 2 * NORM
    assert engine.backward(head, NORM, later=True).gradients >= partition


def test_zero2_with_a_bucket_for_all_reduces_at_the_end_alone():
    """An adapter's gradients all fit: nothing overflows the bucket before the epilogue."""
    size = sizes(adapter=True)
    engine = make(ZERO2, adapter=True, bucket=2 * size.trainable)
    place = Place(**{f: getattr(layer(0), f) for f in Place.__slots__} | {"finished": 60})
    buckets = 2 * 2 * 2 * size.trainable  # two of them, in bf16
    work = engine.backward(place, 20, later=False)
    assert (work.gradients, work.temporaries) == (0, buckets)
    end = engine.finish(later=False)
    assert end.gradients == 4 * size.trainable / RANKS
    assert end.temporaries == buckets + 6 * size.trainable
    # The partition stays for the micro-steps after.
    assert engine.backward(place, 20, later=True).gradients == 4 * size.trainable / RANKS


def test_zero3_lets_go_what_backward_has_used():
    engine = make(ZERO3)
    assert total(engine.loss()) == 2 * TOTAL  # far below the reuse distance
    assert engine.backward(layer(1), 0, later=False).gathered == 2 * (EMBEDDING + 2 * LAYER)
    # The flattened gradients beside Adam's root and quotient.
    assert total(engine.step()) == 12 * TOTAL / RANKS


def test_zero3_gathers_module_by_module_far_from_the_end():
    engine = make(ZERO3)
    far = layer(1)
    above = 10**9
    place = Place(**{f: getattr(far, f) for f in far.__slots__} | {"above": above})
    # A layer's largest module and the prefetch bucket.
    assert engine.forward(place).gathered == 2 * (BIG + 100)
    assert engine.backward(place, 0, later=False).gathered == 2 * (BIG + 100)


def test_offload_moves_states_to_the_host():
    two, three = make(ZERO2, offload=True), make(ZERO3, offload=True, bucket=0)
    part = TOTAL / RANKS
    # Master and moments 12, gradients 4, updated weights 2; a gradient's staging buffer each side.
    assert two.host() == 18 * part + 2 * EMBEDDING
    assert resting(two) == {"parameters": 2 * TOTAL, "buckets": 2 * EMBEDDING}
    # Gradients twice: accumulated, and the optimizer's copy; and the parameters.
    assert three.host() == (12 + 8 + 2) * part
    assert sum(resting(three).values()) == 0
    fsdp = make(FSDP2, offload=True)
    assert fsdp.host() == 16 * part
    assert resting(fsdp) == {}


def test_on_cpu_ranks_offloaded_states_stay():
    moved = make(ZERO2, offload=True, on_cpu=True)
    assert resting(moved)["offloaded"] == moved.host()


def test_fsdp2_holds_two_units_in_forward():
    engine = make(FSDP2)
    # Parameters, and the buffer they were gathered in.
    assert total(engine.forward(layer(2))) == 2 * LAYER + 2 * LAYER
    # The next layer's cast shard and buffer, beside the buffer of this one.
    assert total(engine.enter(layer(2))) == 2 * LAYER + 2 * LAYER * (1 + 1 / RANKS)
    assert total(engine.loss()) == 2 * (EMBEDDING + NORM)


def test_fsdp2_keeps_units_without_reshard():
    engine = make(FSDP2, reshard=False)
    assert total(engine.forward(layer(2))) == 2 * (EMBEDDING + 2 * LAYER) + 4 * LAYER
    assert total(engine.loss()) == 2 * TOTAL
    assert engine.backward(layer(2), 0, later=False).gathered == 2 * (EMBEDDING + 3 * LAYER)


def test_fsdp2_in_backward():
    engine = make(FSDP2)
    work = engine.backward(layer(1), 100, later=False)
    assert work.gathered == 2 * LAYER + 2 * LAYER  # its own, and the next one's buffer
    assert work.gradients == 4 * (1010 + 600) / RANKS + 2 * 100
    assert work.temporaries == 4 * LAYER  # the input of the reduction before
    leaving = engine.leave(layer(1), later=False)
    assert leaving.temporaries == 4 * LAYER * (1 + 1 / RANKS)
    assert leaving.gathered == 2 * LAYER


def test_fsdp2_accumulates_whole_gradients_without_synchronising():
    engine = make(FSDP2, steps=2)
    assert engine.held() == 4 * TOTAL
    first = engine.backward(layer(1), 0, later=False)
    assert (first.gradients, first.temporaries) == (4 * (1010 + 600), 0)
    last = engine.backward(layer(1), 0, later=True)
    finished = 1010 + 600
    assert last.gradients == 4 * (TOTAL - finished) + 4 * finished / RANKS
    assert last.temporaries == 4 * LAYER


def test_a_tied_embedding_is_gathered_from_start_to_end():
    engine = make(FSDP2, tied=True)
    tail = EMBEDDING + NORM
    assert total(engine.forward(layer(2, tied=True))) == 2 * tail + 4 * LAYER
    assert engine.backward(layer(1, tied=True), 0, later=False).gathered == 2 * tail + 4 * LAYER
    # Its gradient waits for the end, and nothing is fetched ahead of the first layer.
    assert engine.backward(layer(0, tied=True), 0, later=False).gathered == 2 * tail + 2 * LAYER
    end = engine.finish(later=False)
    assert end.temporaries == 2 * tail + 4 * tail * (1 + 1 / RANKS)


def test_gloo_copies_what_it_moves():
    on_gpu, on_cpu = make(FSDP2), make(FSDP2, on_cpu=True)
    more = on_cpu.enter(layer(2)).gathered - on_gpu.enter(layer(2)).gathered
    assert more == 2 * LAYER
    more = total(on_cpu.leave(layer(1), later=False)) - total(on_gpu.leave(layer(1), later=False))
    assert more == 4 * LAYER


def test_one_rank_gathers_nothing():
    engine = make(FSDP2, ranks=1)
    assert total(engine.forward(layer(2))) == 2 * LAYER
    assert engine.leave(layer(1), later=False).temporaries == 8 * LAYER


def test_fsdp2_holds_all_gradients_whole_between_first_and_last_micro_step():
    """`unsharded_accumulated_grad` of ``_fsdp_param.py`` stays whole until a step reduces it."""
    two, three = make(FSDP2, steps=2), make(FSDP2, steps=3)
    whole = 4 * TOTAL
    held = three.backward(layer(1), 0, later=True)
    assert held.gradients + held.temporaries == whole
    last = two.backward(layer(1), 0, later=True)
    assert last.gradients + last.temporaries < whole
    # When a layer's backward ends, its new gradients in bf16 are there beside them.
    leaving = three.leave(layer(1), later=True)
    assert leaving.gradients + leaving.temporaries == whole + 2 * LAYER
    # With the first micro-step nothing is held yet.
    first = [engine.backward(layer(1), 0, later=False) for engine in (two, three)]
    assert total(first[0]) == total(first[1])


def test_fsdp2_adds_to_earlier_gradients_before_it_reshards():
    """`post_backward` of ``_fsdp_param_group.py``: the embedding's own bf16 weights are there."""
    end = make(FSDP2, steps=3).finish(later=True)
    assert total(end) == 4 * TOTAL + 2 * EMBEDDING + 2 * EMBEDDING
    on_cpu = make(FSDP2, steps=3, on_cpu=True).finish(later=True)
    assert total(on_cpu) == total(end) + 4 * EMBEDDING  # the addition's cast
    # A tied one's went with the tail's backward.
    size = sizes(tied=True)
    tied = make(FSDP2, steps=3, tied=True, ranks=8).finish(later=True)
    assert total(tied) == 4 * size.total + 2 * (EMBEDDING + NORM)


MANY = 8
"""Ranks enough that the optimizer's temporaries are below the updated weights."""


@pytest.mark.parametrize("strategy", [ZERO1, ZERO2])
def test_gloo_gathers_updated_weights_into_a_copy(strategy):
    """`all_gather_dp_groups` of ``runtime/utils.py``: bf16 weights of the whole model."""
    on_gpu, on_cpu = (make(strategy, ranks=MANY, on_cpu=cpu) for cpu in (False, True))
    part = TOTAL / MANY
    gradients = 2 * TOTAL if strategy == ZERO1 else 4 * part
    adam = 8 * part  # root and quotient of the rank's part
    assert total(on_gpu.step()) == gradients + adam
    # ZeRO-2's partition is gone by then.
    assert total(on_cpu.step()) == 2 * TOTAL + (2 * TOTAL if strategy == ZERO1 else 0)
    alone = make(strategy, ranks=1, on_cpu=True)
    own = 2 * TOTAL if strategy == ZERO1 else 4 * TOTAL
    assert total(alone.step()) == own + 8 * TOTAL


def test_gloo_reduces_a_copy_under_zero3():
    """`reduce_scatter_coalesced` of ``runtime/comm/coalesced_collectives.py``, in fp32."""
    on_gpu, on_cpu, alone = (
        make(ZERO3, on_cpu=cpu, ranks=ranks).backward(layer(1), 1, later=False).temporaries
        for cpu, ranks in ((False, RANKS), (True, RANKS), (True, 1))
    )
    assert (on_gpu, on_cpu, alone) == (4 * BIG, 2 * 4 * BIG, 4 * BIG)


def test_gloo_gathers_through_a_copy_under_zero3():
    """`_all_gather_dtype` of ``partition_parameters.py`` makes one flat buffer of what it moves."""
    on_gpu, on_cpu = make(ZERO3), make(ZERO3, on_cpu=True)
    so_far = EMBEDDING + 3 * LAYER
    assert total(on_gpu.enter(layer(2))) == 2 * (so_far + BIG)
    assert total(on_cpu.enter(layer(2))) == 2 * (so_far + 2 * BIG)


@pytest.mark.parametrize(
    ("strategy", "device", "host"),
    [
        (DDP, 0, 4 * TOTAL),
        (ZERO2, 0, 2 * TOTAL),
        (ZERO3, 2 * EMBEDDING, 2 * TOTAL),
        (FSDP2, 4 * EMBEDDING, 4 * TOTAL),
    ],
)
def test_gathering_the_weights(strategy, device, host):
    assert make(strategy).gather() == (device, host)
