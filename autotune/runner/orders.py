"""Where a ladder's rungs come from: a list, or the supervisor, one at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from autotune.trial.protocol import Request, RungOrder, read_message, rung_file

_LOOK_S = 0.005
_BEAT_S = 5.0
"""How often every rank tells that it waits: far below the limit of a collective."""


class Orders(Protocol):
    """The rungs to measure."""

    def next(self) -> RungOrder | None:
        """Return the next one, the same on every rank; None at the end."""


class ListedOrders:
    """The rungs of a one-shot request."""

    def __init__(self, request: Request) -> None:
        self._rest: Iterator[RungOrder] = iter(
            [RungOrder(launch_id=request.launch_id, rung=rung) for rung in request.rungs]
        )

    def next(self) -> RungOrder | None:
        """Return the next rung of the list."""
        return next(self._rest, None)


class AskedOrders:
    """What the supervisor writes while the ranks run: rank 0 reads it and tells the others."""

    def __init__(self, request: Request, folder: Path, *, progress: Callable[[], None]) -> None:
        self._launch_id = request.launch_id
        self._limit_s = request.idle_limit_s
        self._folder = folder
        self._progress = progress
        self._number = 0

    def next(self) -> RungOrder | None:
        """Wait for the next order.

        Raises:
            TimeoutError: the supervisor lives, or this rank would have died with it, but says
                nothing.
        """
        self._number += 1
        limit = time.monotonic() + self._limit_s
        while True:
            self._progress()
            order = self._told(self._look() if _rank() == 0 else None, limit)
            if isinstance(order, RungOrder):
                return None if order.rung is None else order
            if order:
                raise TimeoutError(
                    f"the supervisor asked for nothing in {self._limit_s:.0f} s: no order "
                    f"{self._number}"
                )

    def _look(self) -> RungOrder | None:
        """Look for the file for a while."""
        path = self._folder / rung_file(self._number)
        until = time.monotonic() + min(_BEAT_S, self._limit_s)
        while time.monotonic() < until:
            if path.exists():
                order = read_message(RungOrder, path)
                if order.launch_id == self._launch_id:
                    return order
            time.sleep(_LOOK_S)
        return None

    def _told(self, found: RungOrder | None, limit: float) -> RungOrder | bool:
        """Return what rank 0 found, or whether it has waited long enough, on every rank."""
        what: list[RungOrder | bool] = [found or time.monotonic() > limit]
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.broadcast_object_list(what, src=0, device=torch.device("cpu"))
        return what[0]


def make_orders(request: Request, folder: Path, *, progress: Callable[[], None]) -> Orders:
    """Return the orders of a request."""
    if request.converses:
        return AskedOrders(request, folder, progress=progress)
    return ListedOrders(request)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
