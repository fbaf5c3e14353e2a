"""Seconds of collectives: by measured tables where there are some, else by the ring formula."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autotune.spec.hardware import HardwareSpec
from autotune.timing.calibration import Calibration, Collective

Array = NDArray[np.float64]

# Share of a link's nominal rate that large collectives reach (nccl-tests on NVLink nodes).
LINK_EFFICIENCY = 0.75
# Base latency of an NCCL ring with the Simple protocol (src/graph/tuning.cc).
_COLLECTIVE_BASE_S = 8.4e-6
_LARGE = 2.0**24
"""Above every stride: separates group size and stride in one key."""


def collective_s(
    num_bytes: Any, ranks: Any, stride: Any, hardware: HardwareSpec, calls: Any
) -> Any:
    """Seconds of ring all-gathers or reduce-scatters that move `num_bytes` in `calls` parts.

    ``alpha + S * (n - 1) / (n * bandwidth)`` for each. A ring over nodes enters a node once for
    each of its members there, so it has that many network cards.

    Args:
        num_bytes: Size of the whole (unsharded) data. Like the others a number or an array.
        ranks: Group size.
        stride: Distance between neighbouring ranks of the group.
        hardware: Links and nodes.
        calls: Number of collectives the data is split over.
    """
    ranks, stride = np.asarray(ranks, float), np.asarray(stride, float)
    per_node = np.maximum(1, np.minimum(ranks, hardware.gpus_per_node // stride))
    nodes = np.ceil(ranks / per_node)
    inside, between = hardware.intra_node, hardware.inter_node
    across = np.minimum(inside.bytes_per_s, between.bytes_per_s * per_node)
    bandwidth = np.where(nodes > 1, across, inside.bytes_per_s)
    hops = (ranks - nodes) * inside.alpha_s + (nodes - 1) * between.alpha_s
    moved = np.asarray(num_bytes, float) * (ranks - 1) / ranks
    seconds = calls * (_COLLECTIVE_BASE_S + hops) + moved / (bandwidth * LINK_EFFICIENCY)
    found = np.where(ranks > 1, seconds, 0.0)
    return found if found.ndim else float(found)


@dataclass(frozen=True, kw_only=True, slots=True)
class Links:
    """Answers what collectives cost on some hardware."""

    hardware: HardwareSpec
    calibration: Calibration | None = None

    def seconds(
        self, kind: Collective, num_bytes: Any, ranks: Any, *, calls: Any = 1, stride: Any = 1
    ) -> Array:
        """Return the seconds of `calls` collectives that together carry `num_bytes`.

        Args:
            kind: Which.
            num_bytes: Of the whole data: what an all-gather ends with, what a reduction or an
                exchange starts from on one rank, what one rank sends to the next.
            ranks: Group size.
            calls: Over how many the data is split.
            stride: Distance between neighbouring ranks of the group.
        """
        num_bytes, ranks, calls, stride = np.broadcast_arrays(
            *(np.asarray(v, float) for v in (num_bytes, ranks, calls, stride))
        )
        ring = _by_formula(kind, num_bytes, ranks, stride, self.hardware, calls)
        if self.calibration is None:
            return ring
        found = ring.copy()
        keys = ranks * _LARGE + stride
        for key in np.unique(keys[ranks > 1]):
            group, distance = (int(part) for part in divmod(key, _LARGE))
            at = keys == key
            curve = self.calibration.collective(kind, group, distance)
            if curve is None:
                continue
            count = np.maximum(calls[at], 1.0)
            measured = count * curve.seconds(num_bytes[at] / count)
            if (curve.ranks, curve.stride) != (group, distance):
                # Another group was measured: its ratio to the formula is what carries over.
                other = _by_formula(
                    kind, num_bytes[at], curve.ranks, curve.stride, self.hardware, count
                )
                measured = ring[at] * measured / other
            found[at] = measured
        return found


def _by_formula(
    kind: Collective, num_bytes: Any, ranks: Any, stride: Any, hardware: HardwareSpec, calls: Any
) -> Array:
    """Return what `collective_s` says of an operation of `Links.seconds`."""
    if kind is Collective.POINT_TO_POINT:
        # All send to their neighbour at once: one hop, and all of the data takes it.
        pair = np.minimum(np.asarray(ranks, float), 2.0)
        return np.asarray(
            collective_s(2 * np.asarray(num_bytes, float), pair, stride, hardware, calls), float
        )
    once = np.asarray(collective_s(num_bytes, ranks, stride, hardware, calls), float)
    return 2 * once if kind is Collective.ALL_REDUCE else once
