"""Live bytes of a rank over time, from the profiler's account of the allocator.

PyTorch's profiler reports every allocation and release of the CPU allocator on the clock of its
other events, so marks set with `record_function` cut the account into phases.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch._C._profiler import _EventType

_PREFIX = "autotune::"
_COLLECTIVES = (
    "all_reduce", "all_gather_into_tensor", "all_gather_single", "reduce_scatter_tensor",
    "reduce_scatter_single", "all_to_all_single", "broadcast",
)  # fmt: skip
_SETTLE_S = 0.002


def mark(name: str) -> None:
    """Set a mark: what follows belongs to `name`, until the next one."""
    with torch.profiler.record_function(_PREFIX + name):
        pass


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """What happened between two marks."""

    name: str
    start_bytes: int
    peak_bytes: int
    end_bytes: int


def record(run: Callable[[], None]) -> list[Window]:
    """Return the windows of `run`, in order; the first is called ``start``."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    return windows_of(profile.profiler.kineto_results.experimental_event_tree())


def windows_of(roots: Iterable[Any]) -> list[Window]:
    """Cut the events of a profile at its marks."""
    events = sorted(_flat(roots), key=lambda event: event[0])
    live: dict[int, int] = {}
    total = start = peak = 0
    name, windows = "start", []
    for _, what, pointer, size in events:
        if what:
            windows.append(
                Window(name=name, start_bytes=start, peak_bytes=peak, end_bytes=total)
            )
            name, start, peak = what, total, total
        elif size > 0:
            # A block that is there still was released by a thread the profiler does not follow.
            total += size - live.pop(pointer, 0)
            live[pointer] = size
            peak = max(peak, total)
        else:
            total -= live.pop(pointer, 0)
    windows.append(Window(name=name, start_bytes=start, peak_bytes=peak, end_bytes=total))
    return windows


def _flat(roots: Iterable[Any]) -> Iterable[tuple[int, str, int, int]]:
    """Yield time, mark, address and size of marks and memory events."""
    waiting = list(roots)
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.typed[0] == _EventType.Allocation:
            fields = event.extra_fields
            yield event.start_time_ns, "", fields.ptr, fields.alloc_size
        elif event.name.startswith(_PREFIX):
            yield event.start_time_ns, event.name.removeprefix(_PREFIX), 0, 0


def settle_collectives() -> None:
    """Let gloo's threads drop their references before the rank drops its own.

    The last one to drop a tensor releases its memory, and the profiler sees this thread alone.
    """

    def settled(collective: Any) -> Any:
        @wraps(collective)
        def call(*args: Any, **kwargs: Any) -> Any:
            work = collective(*args, **kwargs)
            time.sleep(_SETTLE_S)
            return work

        return call

    for name in _COLLECTIVES:
        if hasattr(dist, name):
            setattr(dist, name, settled(getattr(dist, name)))
