"""Live bytes of a rank over time, from the profiler's account of the allocator.

PyTorch's profiler reports every allocation and release of the CPU allocator on the clock of its
other events, so marks set with `record_function` cut the account into phases. It follows one
thread: what others release is found by what the kernel has unmapped at the next mark.
"""

from __future__ import annotations

import bisect
import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch._C._profiler import _EventType
from torch.distributed.tensor import DTensor

_PREFIX = "autotune::"
_COLLECTIVES = (
    "all_reduce", "all_gather_into_tensor", "all_gather_single", "reduce_scatter_tensor",
    "reduce_scatter_single", "all_to_all_single", "broadcast",
)  # fmt: skip
_SETTLE_S = 0.003
_MAPPED_BYTES = 2 * 65536
"""Twice ``MALLOC_MMAP_THRESHOLD_``, as `autotune.trial.launch` sets it."""
_SETTLED = "settled"


_mapped: list[list[tuple[int, int]]] = []
"""What was mapped at each mark, in order."""


_held: dict[str, set[int]] = {}
"""Addresses that Python held at a mark, by its name."""


def mark(name: str, *, python_holds_all: bool = False) -> None:
    """Set a mark: what follows belongs to `name`, until the next one.

    Args:
        name: of the mark.
        python_holds_all: no block is alive but those of tensors that Python knows.
    """
    if python_holds_all:
        tensors = (t for t in gc.get_objects() if isinstance(t, torch.Tensor))
        strided = (t for t in tensors if t.device.type == "cpu" and t.layout is torch.strided)
        _held[name] = {t.untyped_storage().data_ptr() for t in map(_local, strided)}
    ranges = (line.split(" ", 1)[0].split("-") for line in Path("/proc/self/maps").open())
    _mapped.append([(int(first, 16), int(last, 16)) for first, last in ranges])
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
    events = sorted(_flat(roots), key=lambda event: event.time_ns)
    live: dict[int, int] = {}
    mapped = iter(_mapped)
    of_collectives: set[int] = set()
    total = start = peak = 0
    name, windows = "start", []
    for event in events:
        if event.mark == _SETTLED:
            total -= sum(live.pop(pointer, 0) for pointer in of_collectives)
            of_collectives.clear()
        elif event.mark:
            total -= sum(live.pop(pointer) for pointer in _unmapped(live, next(mapped)))
            held = _held.get(event.mark, live)
            total -= sum(live.pop(pointer) for pointer in _large(live) if pointer not in held)
            windows.append(Window(name=name, start_bytes=start, peak_bytes=peak, end_bytes=total))
            name, start, peak = event.mark, total, total
        elif event.size > 0:
            # A block that is there still was released by a thread the profiler does not follow.
            total += event.size - live.pop(event.pointer, 0)
            live[event.pointer] = event.size
            peak = max(peak, total)
            (of_collectives.add if event.of_collective else of_collectives.discard)(event.pointer)
        else:
            total -= live.pop(event.pointer, 0)
    windows.append(Window(name=name, start_bytes=start, peak_bytes=peak, end_bytes=total))
    return windows


def _unmapped(live: dict[int, int], ranges: list[tuple[int, int]]) -> list[int]:
    """Return the blocks that another thread has released.

    A block above glibc's threshold is a mapping of its own, which ends when it is released.
    """
    starts = [first for first, _ in ranges]
    found = []
    for pointer in _large(live):
        place = bisect.bisect_right(starts, pointer) - 1
        if place < 0 or pointer >= ranges[place][1]:
            found.append(pointer)
    return found


def _large(live: dict[int, int]) -> list[int]:
    return [pointer for pointer, size in live.items() if size > _MAPPED_BYTES]


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


class _Event(NamedTuple):
    time_ns: int
    mark: str
    pointer: int = 0
    size: int = 0
    of_collective: bool = False
    """Allocated inside a collective, so released by the process group's thread."""


def _flat(roots: Iterable[Any]) -> Iterable[_Event]:
    """Yield marks and memory events."""
    waiting = [(root, False) for root in roots]
    while waiting:
        event, inside = waiting.pop()
        if event.typed[0] == _EventType.Allocation:
            fields = event.extra_fields
            yield _Event(event.start_time_ns, "", fields.ptr, fields.alloc_size, inside)
        elif event.name.startswith(_PREFIX):
            yield _Event(event.start_time_ns, event.name.removeprefix(_PREFIX))
        inside = inside or event.name.startswith("c10d::")
        waiting += [(child, inside) for child in event.children]


def settle_collectives() -> None:
    """Let gloo's threads drop their references before the rank drops its own.

    The last one to drop a tensor releases its memory, and the profiler sees this thread alone. What
    a collective allocates for itself is released by gloo's thread: a mark says that it is by then.
    """

    def settled(collective: Any) -> Any:
        @wraps(collective)
        def call(*args: Any, **kwargs: Any) -> Any:
            work = collective(*args, **kwargs)
            if work is not None:
                work.wait()
            time.sleep(_SETTLE_S)
            with torch.profiler.record_function(_PREFIX + _SETTLED):
                pass
            return work

        return call

    # DeepSpeed gathers several parameters inside a manager, which waits for them later.
    manager = dist.distributed_c10d._CoalescingManager
    manager.wait = settled(manager.wait)  # type: ignore[method-assign]
    for name in _COLLECTIVES:
        if hasattr(dist, name):
            setattr(dist, name, settled(getattr(dist, name)))
