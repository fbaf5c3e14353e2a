"""Why plans are left out, in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from autotune.planner.estimate import Estimate
from autotune.planner.order import closest_to_fitting
from autotune.spec.hardware import HardwareSpec
from autotune.spec.model import ModelSpec
from autotune.units import format_bytes


def refusal_lines(refused: Iterable[tuple[str, str]]) -> list[str]:
    """Return a line for each code of ``(code, reason)``: how many have it, and the first reason."""
    reasons: dict[str, list[str]] = {}
    for code, reason in refused:
        reasons.setdefault(code, []).append(reason)
    return [f"{code} x {len(given)}: {given[0]}" for code, given in sorted(reasons.items())]


def nothing_fits(model: ModelSpec, hardware: HardwareSpec, candidates: Sequence[Estimate]) -> str:
    """Say what comes closest, by how much it misses, and what to do."""
    closest = closest_to_fitting(candidates)
    misses = []
    need, have = closest.peak.expected_bytes, hardware.gpu.memory_bytes
    if need > have:
        misses.append(
            f"needs {format_bytes(need)} of {format_bytes(have)} on each device, "
            f"{format_bytes(need - have)} too much"
        )
    host, host_have = (
        closest.peak.node_host_bytes(hardware.gpus_per_node),
        hardware.host_memory_bytes,
    )
    if host > host_have:
        misses.append(
            f"needs {format_bytes(host)} of {format_bytes(host_have)} host memory for a node's "
            f"GPUs, "
            f"{format_bytes(host - host_have)} too much"
        )
    return (
        f"{model.name} fits {hardware.describe()} under no strategy. Closest: "
        f"{closest.plan.describe()}, which {' and '.join(misses)}. Use more GPUs or larger ones, "
        "a shorter --seq-len, or --adapter lora."
    )
