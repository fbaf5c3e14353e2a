"""Tensor parallelism: each projection of each layer split over the `tp` ranks, under FSDP2.

Shoeybi et al., "Megatron-LM", arXiv:1909.08053, by PyTorch's DTensors: queries, keys, values, gate
and up by their outputs; attention output and down by their inputs, summed over the ranks; embedding
and output head by the vocabulary. A layer's ranks so exchange its hidden states four times a
micro-step: twice in forward, twice in backward.

The model is split before the Trainer exists, on the mesh accelerate will shard over its other
dimensions. Every parameter becomes a DTensor, the norms replicated ones: a plain tensor beside them
would be another mesh to the gradient norm, and where only the rank's own heads pass through a norm
(Qwen3's and Gemma 3's of queries and keys) its gradient would be of these heads alone, another one
on every rank, without a word.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.parallelism_config import ParallelismConfig
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import Placement
from transformers import PreTrainedModel

from autotune.errors import AutotuneError
from autotune.runner.compiling import decoder_layers

TP = "tp"
"""Of the mesh's dimensions, the innermost one: neighbouring ranks have the fastest links."""
_COLUMNS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj",
            "mlp.up_proj")  # fmt: skip
_ROWS = ("self_attn.o_proj", "mlp.down_proj")
_OF_HEADS = ("q_norm", "k_norm")
"""Norms over each head: they see ``[batch, seq_len, heads / tp, head_dim]``."""
_HEADS = 2
"""The dimension of the heads there."""


class SplitMesh(ParallelismConfig):
    """accelerate's mesh with a dimension `tp`, along which the model is split already.

    accelerate 1.15 would make replicated DTensors of what is plain, of which there is nothing; for
    that it imports `ReplicateParallel`, which transformers 5.24 no longer has.
    """

    @property
    def tp_enabled(self) -> bool:
        """Say whether accelerate has to do something: to make the mesh."""
        return self.device_mesh is None and self.tp_size > 1


def split_model(model: PreTrainedModel, parallelism: ParallelismConfig, device: str) -> None:
    """Split a whole model, of which every rank has the same copy, in place.

    Args:
        model: on the host; its parts go where the mesh is.
        parallelism: of the plan, `SplitMesh`.
        device: ``cuda`` or ``cpu``.

    Raises:
        AutotuneError: a layer is built otherwise than the families this is for.
    """
    mesh = parallelism.get_device_mesh(device)[TP]
    for layer in decoder_layers(model):
        _split_layer(layer, mesh)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is embedding.weight
    # Each rank finds its own rows and 0 for the others' tokens; their sum is the embedding.
    _apply(embedding, mesh, RowwiseParallel(input_layouts=Replicate()))
    _apply(head, mesh, ColwiseParallel(output_layouts=Replicate()))
    if tied:
        head.weight = embedding.weight
    for name, module in model.named_modules():
        _replicate(name, module, mesh)


def _split_layer(layer: nn.Module, mesh: DeviceMesh) -> None:
    try:
        columns = [layer.get_submodule(name) for name in _COLUMNS]
        rows = [layer.get_submodule(name) for name in _ROWS]
    except AttributeError as error:
        raise AutotuneError(
            f"Tensor parallelism knows no {type(layer).__name__}: {error}. Use tp 1."
        ) from error
    for module in columns:
        _apply(module, mesh, ColwiseParallel())
    for module in rows:
        _apply(module, mesh, RowwiseParallel())
    for name in ("self_attn", "mlp"):
        # Once for all projections that read it: their gradients are summed before the ranks' are.
        _wrap_input(layer.get_submodule(name), mesh, Replicate())


def _apply(module: nn.Module, mesh: DeviceMesh, style: ParallelStyle) -> None:
    # Without a source each rank takes its part of the copy it has, and nothing is sent.
    parallelize_module(module, mesh, style, src_data_rank=None)


def _replicate(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
    """Make replicated DTensors of a module's own parameters that are plain: those of norms."""
    plain = {
        key: parameter
        for key, parameter in module.named_parameters(recurse=False)
        if not isinstance(parameter, DTensor)
    }
    if not plain:
        return
    for key, parameter in plain.items():
        whole = distribute_tensor(parameter, mesh, [Replicate()], src_data_rank=None)
        module.register_parameter(key, nn.Parameter(whole, parameter.requires_grad))
    of_heads = name.rpartition(".")[2] in _OF_HEADS
    # Told that the heads are split, DTensor knows the weight's gradient for a part of a sum.
    _wrap_input(module, mesh, Shard(_HEADS) if of_heads else Replicate())
    module.register_forward_hook(_to_local)


def _wrap_input(module: nn.Module, mesh: DeviceMesh, placement: Placement) -> None:
    """Hand a module its hidden states as a DTensor: the first argument, or ``hidden_states``."""

    def wrapped(x: torch.Tensor) -> DTensor:
        return DTensor.from_local(x, mesh, [placement], run_check=False)

    def wrap(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (wrapped(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": wrapped(kwargs["hidden_states"])}

    module.register_forward_pre_hook(wrap, with_kwargs=True)


def _to_local(module: nn.Module, args: Any, output: DTensor) -> torch.Tensor:
    return output.to_local()
