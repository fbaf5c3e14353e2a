"""Times one piece of work on all ranks together."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

_LEAST, _MOST = 3, 50


class SweepClock:
    """Repeats work, the same number of times on every rank, each after the ranks have met."""

    def __init__(self, device: torch.device, item_s: float) -> None:
        self.device = device
        self.item_s = item_s

    def seconds(self, work: Callable[[], object]) -> float:
        """Return the median seconds of `work`, warmed up; the same on all ranks: the slowest's."""
        work()
        once = self._slowest(self._once(work))
        count = max(_LEAST, min(_MOST, int(self.item_s / max(once, 1e-7))))
        return self._slowest(statistics.median(self._once(work) for _ in range(count)))

    def _once(self, work: Callable[[], object]) -> float:
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.barrier()
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        """Let the device finish."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _slowest(self, seconds: float) -> float:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return seconds
        found = torch.tensor([seconds], device=self.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return float(found)


def start_group(device: str) -> torch.device:
    """Start the process group of one part and return this rank's device."""
    if device == "cuda":
        rank = int(os.environ["LOCAL_RANK"])
        torch.cuda.set_device(rank)
        dist.init_process_group("cuda:nccl,cpu:gloo")
        return torch.device("cuda", rank)
    dist.init_process_group("gloo")
    return torch.device("cpu")
