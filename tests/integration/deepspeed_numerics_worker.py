"""One rank: steps a one-weight model once under each DeepSpeed plan and prints what happened.

The weight starts at 0 and its gradient is whatever the input is, so after one SGD step at learning
rate 1 the fp32 master weight shows, to the bit, in which type gradients were added up.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param

from autotune.emit.deepspeed import deepspeed_config
from autotune.plan import Engine, Plan
from autotune.spec.model import load_model
from autotune.spec.workload import Workload

SIZE = 64


class OneWeight(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(SIZE))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return (self.weight * inputs.to(self.weight.dtype)).sum().float()


CONTRACT_KEYS = ("communication_data_type", "data_types")


def master_after_step(plan: Plan, inputs: list[float], contract: bool) -> float:
    """Return the fp32 master weight after one optimizer step over `inputs`, one a micro-step."""
    workload = Workload(optimizer="sgd", global_batch_size=1)
    config = deepspeed_config(
        plan, load_model("tiny-qwen3"), workload, device="cpu", max_grad_norm=0.0
    )
    if not contract:
        config = {key: value for key, value in config.items() if key not in CONTRACT_KEYS}
    model = OneWeight()
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), config=config
    )
    for value in inputs:
        engine.backward(engine(torch.full((SIZE,), value)))
        engine.step()
    master = safe_get_full_fp32_param(engine.module.weight)
    engine.destroy()
    return float(master[0])


def main(out: str) -> None:
    """Write ``{plan name: {"accumulated", "reduced"}}`` from rank 0.

    A name that ends in ``_without`` ran without the keys of the contract: the control.
    """
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    results = {}
    for stage, offload, contract in (
        (1, False, True),
        (2, False, True),
        (3, False, True),
        (1, True, True),
        (2, True, True),
        (3, True, True),
        (2, False, False),
    ):
        plan = Plan(
            strategy="-",
            engine=Engine.DEEPSPEED,
            zero_stage=stage,
            offload_optimizer=offload,
            dp_shard=world,
            grad_accum_steps=2,
        )
        # 256 and 1 take nine significant bits together; bf16 has eight.
        value = 256.0 if rank == 0 else 1.0
        name = f"zero{stage}{'_offload' if offload else ''}{'' if contract else '_without'}"
        results[name] = {
            "accumulated": master_after_step(plan, [256.0, 1.0], contract),
            "reduced": master_after_step(plan, [value, 0.0], contract),
        }
    if rank == 0:
        Path(out).write_text(json.dumps(results))
    torch.distributed.barrier()
    sys.stdout.flush()
    # DeepSpeed's threads sometimes abort the interpreter's shutdown; the results are written.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
