"""Live bytes of a rank over time, from the profiler's account of the allocator.

PyTorch's profiler reports every allocation and release of the CPU allocator (``[memory]`` events)
on the clock of its other events, so marks set with `record_function` cut the account into phases.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_PREFIX = "autotune::"


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
    return windows_of(profile.profiler.kineto_results.events())


def windows_of(events: list[Any]) -> list[Window]:
    """Cut the events of a profile at its marks."""
    marks: list[tuple[int, str]] = []
    memory: list[tuple[int, int]] = []
    for event in events:
        name = event.name()
        if name == "[memory]":
            memory.append((event.start_ns(), event.nbytes()))
        elif name.startswith(_PREFIX):
            marks.append((event.start_ns(), name.removeprefix(_PREFIX)))
    memory.sort(key=lambda pair: pair[0])
    marks.sort()
    times = [time for time, _ in memory]
    cuts = [0, *(bisect.bisect_left(times, time) for time, _ in marks), len(memory)]
    names = ["start", *(name for _, name in marks)]
    windows, live = [], 0
    for name, (first, last) in zip(names, itertools.pairwise(cuts), strict=True):
        start = peak = live
        for _, size in memory[first:last]:
            live += size
            peak = max(peak, live)
        windows.append(Window(name=name, start_bytes=start, peak_bytes=peak, end_bytes=live))
    return windows
