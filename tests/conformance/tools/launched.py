"""What the tests give to `accelerate launch`: one step of a small model, and what ran it.

``launched.py MODEL.json ANSWER [cpu|gpus]``: rank 0 writes the answer. With ``cpu`` the script asks
for it, without which accelerate wraps nothing on CPU ranks, whatever its file says. With ``gpus``,
CPU ranks count as GPUs, as in the runner: without it accelerate shards nothing there by FSDP2.
"""

import copy
import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

RATE = 0.5


def tokens(rank: int) -> torch.Tensor:
    return (torch.arange(32).view(2, 16) * (rank + 3)) % 512


def stepped(model: torch.nn.Module, ranks: int) -> dict[str, torch.Tensor]:
    """Return the weights after one step of one process over all ranks' tokens."""
    losses = [model(input_ids=tokens(rank), labels=tokens(rank)).loss for rank in range(ranks)]
    torch.stack(losses).mean().backward()
    return {name: p.detach() - RATE * p.grad for name, p in model.named_parameters()}


def whole(parameter: torch.nn.Parameter, deepspeed: bool) -> torch.Tensor:
    if deepspeed:
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def shards_of(layer: torch.nn.Module) -> Any:
    """Return what shards a layer's weights.

    Where it recomputes, accelerate shards both the layer and what wraps it; one of them holds them.
    """
    units = [unit for unit in layer.modules() if isinstance(unit, FSDPModule)]
    groups = [unit._get_fsdp_state()._fsdp_param_group for unit in units]
    (held,) = [group for group in groups if group is not None] or [None]
    return held


def main(config: str, answer: str, *options: str) -> None:
    gpus = "gpus" in options
    if gpus:
        from autotune.runner.cpu_shim import install_cpu_fsdp_shim

        dist.init_process_group("gloo")
        assert install_cpu_fsdp_shim()
    torch.manual_seed(0)
    with open(config) as file:
        settings = AutoConfig.for_model(**json.load(file))
    # Before accelerate is there: under ZeRO-3 it would hand out models in shards.
    plain = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    reference = copy.deepcopy(plain)
    accelerator = Accelerator(cpu=bool(options))
    prepared = accelerator.prepare(plain, torch.optim.SGD(plain.parameters(), lr=RATE))
    model, optimizer = prepared
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    accelerator.backward(model(input_ids=tokens(rank), labels=tokens(rank)).loss)
    optimizer.step()
    deepspeed = type(model).__name__ == "DeepSpeedEngine"
    inner = accelerator.unwrap_model(model)
    named = {name.replace("_checkpoint_wrapped_module.", ""): p
             for name, p in inner.named_parameters()}  # fmt: skip
    want = stepped(reference, ranks)
    off = [float((whole(p, deepspeed) - want[name]).detach().abs().max())
           for name, p in named.items()]  # fmt: skip
    layers = inner.model.layers
    facts = {
        "model": "FSDP2" if isinstance(model, FSDPModule) else type(model).__name__,
        "ranks": ranks,
        "accelerate_counts": accelerator.num_processes,
        "stage": model.zero_optimization_stage() if deepspeed else None,
        "compared": len(off),
        "off_by": max(off),
        "moved": max(float((want[n] - p.detach()).abs().max())
                     for n, p in reference.named_parameters()),
        "recomputed": sum(type(layer).__name__.endswith("CheckpointWrapper")
                          or hasattr(layer, "_checkpoint_wrapped_module") for layer in layers),
        "resharded": [bool(group.post_forward_mesh_info)
                      for layer in layers if (group := shards_of(layer)) is not None],
    }  # fmt: skip
    if rank == 0:
        with open(answer, "w") as file:
            json.dump(facts, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
