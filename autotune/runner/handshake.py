"""A rank of the doctor's all-reduces: ``python -m autotune.runner.handshake NUMBER DEVICE``.

It reads one order a line from stdin (``{"store", "ranks", "elements", "timeout_s"}``), makes a
process group of those ranks, sums a tensor, and answers in one line on stdout. Whoever gave the
order waits; this process may hang, and is killed then.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


def main() -> None:
    """Serve orders until stdin ends."""
    number, device = int(sys.argv[1]), sys.argv[2]
    answers = os.fdopen(os.dup(1), "w", buffering=1)  # NCCL prints to 1
    os.dup2(2, 1)
    if device == "cuda":
        torch.cuda.set_device(number)
    answers.write(json.dumps({"ready": number}) + "\n")
    for line in sys.stdin:
        answers.write(json.dumps(_serve(number, device, json.loads(line))) + "\n")


def _serve(number: int, device: str, order: dict[str, Any]) -> dict[str, Any]:
    ranks = order["ranks"]
    limit = timedelta(seconds=order["timeout_s"])
    started = time.perf_counter()
    try:
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo",
            store=dist.FileStore(order["store"], len(ranks)),
            rank=ranks.index(number),
            world_size=len(ranks),
            timeout=limit,
        )
        values = torch.full((order["elements"],), float(number + 1), device=device)
        dist.all_reduce(values)
        low, high = values.min().item(), values.max().item()
        joined_s = time.perf_counter() - started
        started = time.perf_counter()
        dist.all_reduce(values)
        if device == "cuda":
            torch.cuda.synchronize()
        sum_s = time.perf_counter() - started
    except (RuntimeError, ValueError, OSError) as error:
        # What torch.distributed, NCCL, CUDA and the store's file fail with is an answer; with
        # anything else, a fault of ours, the process ends, which is told as well.
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    expected = float(sum(rank + 1 for rank in ranks))
    if not low == high == expected:
        return {"error": f"wrong sum: {low:g} to {high:g} where {expected:g} is right"}
    return {"joined_s": joined_s, "sum_s": sum_s}


if __name__ == "__main__":
    main()
