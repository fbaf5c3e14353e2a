"""FSDP2's placements against plans that ask for others: four ranks that are one process.

The process group is torch's fake one, which answers every collective at once: sharding is laid out
as on four ranks, and nothing but the checks runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM

from autotune.plan import Plan
from autotune.runner.checks import InvalidRunError, _check_fsdp2
from autotune.runner.compiling import decoder_layers
from autotune.runner.tensor_parallel import SplitMesh, split_model
from autotune.spec.workload import Precision, Workload
from tests.integration.ranks import make_plan, small_config

pytestmark = pytest.mark.integration

BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


@pytest.fixture(scope="module", autouse=True)
def four_ranks() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    dist.destroy_process_group()


def sharded(
    plan: Plan,
    policy: MixedPrecisionPolicy = BF16,
    *,
    dtype: torch.dtype = torch.float32,
    layers: bool = True,
    split: Callable[[torch.nn.Module], None] = lambda model: None,
) -> torch.nn.Module:
    """The small model, laid out as accelerate lays out the plan."""
    config = AutoConfig.for_model(**small_config())
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if plan.tp > 1:
        parallelism = SplitMesh(dp_shard_size=plan.shard_size, tp_size=plan.tp)
        split_model(model, parallelism, "cpu")
        split(model)
        mesh = parallelism.get_device_mesh()["dp_shard"]
    elif plan.dp_replicate > 1:
        sizes = (plan.dp_replicate, plan.shard_size)
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh("cpu", (plan.shard_size,), mesh_dim_names=("shard",))
    options: dict[str, Any] = {
        "mesh": mesh,
        "reshard_after_forward": plan.reshard_after_forward,
        "mp_policy": policy,
    }
    for layer in decoder_layers(model) if layers else ():
        fully_shard(layer, **options)
    return fully_shard(model, **options)


@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp2_no_reshard", "hsdp"])
def test_a_plan_is_found_as_it_was_laid_out(strategy: str) -> None:
    plan = make_plan(strategy, 4)
    assert _check_fsdp2(sharded(plan), plan, Workload())["fsdp_units"] == 3


@pytest.mark.parametrize(
    ("runs", "asked", "words"),
    [
        ("fsdp2", make_plan("hsdp", 4), "placements of"),
        ("hsdp", make_plan("fsdp2", 4), "placements of"),
        ("hsdp", make_plan("hsdp", 8), "mesh of"),
        ("fsdp2", make_plan("fsdp2", 8), "mesh of"),
        ("fsdp2", make_plan("fsdp2_no_reshard", 4), "reshard after forward"),
        ("fsdp2_no_reshard", make_plan("fsdp2", 4), "reshard after forward"),
        ("fsdp2", make_plan("fsdp2", 4, recompute=True), "recomputed layers"),
    ],
)
def test_another_layout_is_refused(runs: str, asked: Plan, words: str) -> None:
    with pytest.raises(InvalidRunError, match=words):
        _check_fsdp2(sharded(make_plan(runs, 4)), asked, Workload())


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (MixedPrecisionPolicy(reduce_dtype=torch.float32), "compute dtype"),
        (
            MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16),
            "gradient reduction dtype",
        ),
    ],
)
def test_other_types_are_refused(policy: MixedPrecisionPolicy, words: str) -> None:
    plan = make_plan("fsdp2", 4)
    with pytest.raises(InvalidRunError, match=words):
        _check_fsdp2(sharded(plan, policy), plan, Workload(precision=Precision.BF16))


def test_weights_in_bf16_are_refused() -> None:
    plan = make_plan("fsdp2", 4)
    with pytest.raises(InvalidRunError, match="master dtype"):
        _check_fsdp2(sharded(plan, dtype=torch.bfloat16), plan, Workload())


def test_layers_left_out_are_refused() -> None:
    plan = make_plan("fsdp2", 4)
    with pytest.raises(InvalidRunError, match="layers left unwrapped"):
        _check_fsdp2(sharded(plan, layers=False), plan, Workload())


TP = make_plan("fsdp2", 4, tp=2)


def test_a_split_model_is_found_as_it_was_laid_out() -> None:
    placements = _check_fsdp2(sharded(TP), TP, Workload())["placements"]
    # Of 2 layers: 5 projections by their outputs and the embedding, 2 by their inputs, 4 norms
    # and the final one.
    assert list(placements.values()) == [11, 4, 9]


@pytest.mark.parametrize(
    ("runs", "asked"), [("fsdp2", make_plan("fsdp2", 4, tp=2)), ("tp", make_plan("fsdp2", 4))]
)
def test_a_model_that_is_not_split_as_asked_is_refused(runs: str, asked: Plan) -> None:
    model = sharded(TP if runs == "tp" else make_plan("fsdp2", 4))
    with pytest.raises(InvalidRunError, match="placements of"):
        _check_fsdp2(model, asked, Workload())


def test_a_projection_split_the_other_way_is_refused() -> None:
    def by_outputs(model: torch.nn.Module) -> None:
        weight = model.model.layers[0].self_attn.o_proj.weight
        turned = weight.detach().redistribute(placements=[Shard(0)])
        model.model.layers[0].self_attn.o_proj.weight = torch.nn.Parameter(turned)

    with pytest.raises(InvalidRunError, match=r"placements of .*o_proj\.weight"):
        _check_fsdp2(sharded(TP, split=by_outputs), TP, Workload())


def test_a_head_that_is_no_longer_the_embedding_is_refused() -> None:
    def untie(model: torch.nn.Module) -> None:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())

    with pytest.raises(InvalidRunError, match="output head that is the embedding"):
        _check_fsdp2(sharded(TP, split=untie), TP, Workload())
