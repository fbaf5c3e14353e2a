"""Checks of the GPUs: free memory and who holds it, links and peer access."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from autotune.doctor.finding import Finding, Level, note, ok, warning
from autotune.units import format_bytes

_BUSY = 0.05
"""Share of a GPU's memory that others may hold before it matters."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Process:
    """One that holds memory of a GPU."""

    pid: int
    name: str
    used_bytes: int | None
    """None where the driver does not tell, as in many containers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One GPU as NVML tells of it."""

    index: int
    """CUDA's number, which CUDA_VISIBLE_DEVICES decides; ranks have the same."""
    name: str
    total_bytes: int | None
    """None where it has no memory of its own and takes its host's."""
    free_bytes: int | None
    nvml_index: int | None = None
    """NVML's number, as nvidia-smi shows it; None where it is the same."""
    processes: tuple[Process, ...] = ()
    nvlinks: int = 0
    """Links up."""
    mig: bool = False
    """It is a slice of a GPU, or a GPU in MIG mode that has none."""
    uncorrected_errors: int | None = None
    """Memory errors since boot that could not be corrected; None without ECC."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """How two GPUs are joined."""

    first: int
    """CUDA's numbers, as in `Gpu.index`."""
    second: int
    path: str
    """`NVLink`, or what lies between them: `PIX`, `PXB`, `PHB`, `NODE`, `SYS`."""
    peer_access: bool | None
    """Whether each reads the other's memory; None where the driver does not tell."""


def check_gpus(gpus: Sequence[Gpu]) -> list[Finding]:
    """Look at each GPU's free memory and errors, and whether all are of one kind."""
    if not gpus:
        return []
    kinds = Counter(gpu.name for gpu in gpus)
    found = [ok("gpus", ", ".join(f"{count} x {name}" for name, count in kinds.items()))]
    if len(kinds) > 1:
        found = [
            warning("gpus", found[0].seen, "The slowest and the smallest set the pace and the "
                    "limit: choose alike ones with CUDA_VISIBLE_DEVICES.")
        ]  # fmt: skip
    if any(gpu.nvml_index not in (None, gpu.index) for gpu in gpus):
        named = ", ".join(f"GPU {gpu.index} is {gpu.nvml_index}" for gpu in gpus)
        found.append(note("gpu_numbers", f"numbers as CUDA_VISIBLE_DEVICES has them; in "
                          f"nvidia-smi {named}"))  # fmt: skip
    for gpu in gpus:
        seen, busy = _memory(gpu)
        if busy:
            found.append(
                warning("gpu_memory", f"{seen}; {_holders(gpu)}",
                        "End them, or leave the GPU out with CUDA_VISIBLE_DEVICES: measured times "
                        "and limits are not its own.")
            )  # fmt: skip
        else:
            found.append(ok("gpu_memory", seen))
        if gpu.uncorrected_errors:
            found.append(
                Finding(
                    check="gpu_errors", level=Level.BROKEN,
                    seen=f"GPU {gpu.index}: {gpu.uncorrected_errors} uncorrected memory errors",
                    do="Reset the GPU or the host; nvidia-smi -q -d ECC,ROW_REMAPPER says more.",
                )
            )  # fmt: skip
        if gpu.mig:
            found.append(
                warning("gpu_mig", f"GPU {gpu.index} is in MIG mode", "Slices of one GPU have no "
                        "peer access and NCCL takes one a process: train on one, or on whole GPUs.")
            )  # fmt: skip
    return found


def check_links(pairs: Sequence[Pair]) -> list[Finding]:
    """Look at how the GPUs are joined, and whether they reach each other's memory."""
    if not pairs:
        return []
    paths = Counter(pair.path for pair in pairs)
    seen = ", ".join(f"{path} x {count}" for path, count in paths.most_common())
    found = [ok("links", f"pairs: {seen}")]
    if len(paths) > 1 and "NVLink" in paths:
        found = [
            note("links", f"pairs: {seen}", "Some pairs alone have NVLink: shard inside such a "
                 "group (hsdp, or fewer GPUs by CUDA_VISIBLE_DEVICES).")
        ]  # fmt: skip
    elif "NVLink" not in paths:
        found = [
            note("links", f"pairs: {seen}; no NVLink", "ZeRO-3 and FSDP2 send much over PCIe; "
                 "ZeRO-1/2 and larger accumulation send less. A search measures it.")
        ]  # fmt: skip
    without = [f"{pair.first}-{pair.second}" for pair in pairs if pair.peer_access is False]
    if without:
        found.append(
            warning("peer_access", f"none between GPUs {', '.join(without)}",
                    "Consumer cards have none; where the first collective hangs set "
                    "NCCL_P2P_DISABLE=1 (and NCCL_IB_DISABLE=1, which accelerate asks for too).")
        )  # fmt: skip
    elif all(pair.peer_access for pair in pairs):
        found.append(ok("peer_access", "every GPU reads every other's memory"))
    return found


def _memory(gpu: Gpu) -> tuple[str, bool]:
    """Say what memory is free, and whether others hold some that matters."""
    if gpu.total_bytes is None or gpu.free_bytes is None:
        return f"GPU {gpu.index}: shares the host's memory", bool(gpu.processes)
    free, total = format_bytes(gpu.free_bytes), format_bytes(gpu.total_bytes)
    used = gpu.total_bytes - gpu.free_bytes
    busy = bool(gpu.processes) or used > _BUSY * gpu.total_bytes
    return f"GPU {gpu.index}: {free} of {total} free", busy


def _holders(gpu: Gpu) -> str:
    if not gpu.processes and gpu.total_bytes is not None and gpu.free_bytes is not None:
        return f"{format_bytes(gpu.total_bytes - gpu.free_bytes)} held by processes not seen here"
    return "held by " + ", ".join(
        f"{each.name} ({each.pid}"
        + (f", {format_bytes(each.used_bytes)})" if each.used_bytes is not None else ")")
        for each in gpu.processes
    )
