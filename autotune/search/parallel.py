"""Several launches of one search at once, on devices of their own."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Protocol

from autotune.errors import AutotuneError


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """Where one launch after another runs."""

    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of its ranks, such as CUDA_VISIBLE_DEVICES."""
    cores: frozenset[int] | None = None
    """Cores its ranks are kept to; None for all."""


OTHERS_MEASURE = "other launches measure what is left"


class Desk:
    """What the loops of one search share: a lock, and which family each of them measures.

    A family is measured by one launch at a time. Asking, recording and telling happen under the
    lock, measuring does not.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.stopping = False
        """Set when the search is interrupted: what launches say from then on is not recorded."""
        self._busy: dict[int, str] = {}
        self._unmeasured: set[int] = set()

    def take(self, loop: object, family: str) -> None:
        """Note that a loop launches a family."""
        self._busy[id(loop)] = family
        self._unmeasured.add(id(loop))

    def measured(self, loop: object) -> None:
        """Note that a loop's launch has a record, and so counts by itself."""
        self._unmeasured.discard(id(loop))

    def free(self, loop: object) -> None:
        """Note that a loop's launch has ended."""
        self._busy.pop(id(loop), None)
        self._unmeasured.discard(id(loop))

    def families_of_others(self, loop: object) -> set[str]:
        """Return what other loops are measuring."""
        return {family for key, family in self._busy.items() if key != id(loop)}

    def num_unmeasured(self, loop: object) -> int:
        """Return how many launches of other loops run and have no record yet."""
        return len(self._unmeasured - {id(loop)})


class Runs(Protocol):
    """A loop; see `autotune.search.loop.Loop`."""

    def run(self) -> str: ...  # noqa: D102


class Pinned:
    """A loop whose thread is kept to some cores; the ranks it starts inherit them."""

    def __init__(self, loop: Runs, cores: frozenset[int] | None) -> None:
        self._loop, self._cores = loop, cores

    def run(self) -> str:
        """Run the loop."""
        if self._cores is not None:
            os.sched_setaffinity(0, self._cores)  # 0 is the calling thread
        return self._loop.run()


def run_side_by_side(loops: Sequence[Runs], desk: Desk, stop_all: Callable[[], object]) -> str:
    """Run loops in threads until all have ended; return why the search stopped.

    Args:
        loops: One for each set of devices.
        desk: What they share.
        stop_all: Ends every launch at once; called on Ctrl-C, and when a loop fails.

    Raises:
        KeyboardInterrupt: after every launch was stopped.
        AutotuneError: what a loop raised; the others were stopped.
    """
    ended: list[Future[str]] = []  # the first to end first
    with ThreadPoolExecutor(len(loops)) as threads:
        runs = [threads.submit(loop.run) for loop in loops]
        for run in runs:
            run.add_done_callback(ended.append)
        try:
            while len(ended) < len(runs) and not any(run.exception() for run in ended):
                wait(runs, timeout=0.1, return_when=FIRST_EXCEPTION)  # so that Ctrl-C is heard
        finally:
            if len(ended) < len(runs):
                desk.stopping = True
                stop_all()
    reasons = [run.result() for run in ended]
    return next((reason for reason in reversed(reasons) if reason != OTHERS_MEASURE), reasons[-1])


def gpu_slots(gpus: int, visible: int, wanted: int | None) -> list[Slot]:
    """Return slots of disjoint GPUs.

    Args:
        gpus: Of a launch.
        visible: GPUs this process sees.
        wanted: How many slots; None takes as many as there are GPUs for.

    Raises:
        AutotuneError: not so many GPUs.
    """
    most = max(1, visible // gpus)
    slots = most if wanted is None else wanted
    if slots > most:
        raise AutotuneError(
            f"--parallel {slots}: {slots} launches of {gpus} GPUs need {slots * gpus}, {visible} "
            f"are visible. Give --parallel {most} or less."
        )
    if slots == 1:
        return [Slot()]
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = named.split(",") if named else [str(n) for n in range(visible)]
    return [
        Slot(environment={"CUDA_VISIBLE_DEVICES": ",".join(names[n * gpus : (n + 1) * gpus])})
        for n in range(slots)
    ]


def core_slots(ranks: int, wanted: int | None) -> list[Slot]:
    """Return slots of disjoint cores of this process, for launches of CPU ranks.

    Args:
        ranks: Of a launch.
        wanted: How many slots; None is one: CPU ranks share memory bandwidth.

    Raises:
        AutotuneError: fewer cores than ranks: launches would measure each other.
    """
    slots = wanted or 1
    if slots == 1:
        return [Slot()]
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // slots
    if share < ranks:
        raise AutotuneError(
            f"--parallel {slots}: {slots} launches of {ranks} CPU ranks need {slots * ranks} "
            f"cores, {len(cores)} are here: they would measure each other. Give --parallel "
            f"{max(1, len(cores) // ranks)} or less."
        )
    return [Slot(cores=frozenset(cores[n * share : (n + 1) * share])) for n in range(slots)]
