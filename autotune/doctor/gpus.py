"""Checks of the GPUs: free memory and who holds it, links and peer access, as NVML tells them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from autotune.doctor.finding import Finding, Level, note, ok, warning
from autotune.spec.nvml import visible_indices
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
    name: str
    total_bytes: int
    free_bytes: int
    processes: tuple[Process, ...] = ()
    nvlinks: int = 0
    """Links up."""
    mig: bool = False
    uncorrected_errors: int | None = None
    """Memory errors since boot that could not be corrected; None without ECC."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """How two GPUs are joined."""

    first: int
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
    for gpu in gpus:
        used = gpu.total_bytes - gpu.free_bytes
        seen = (
            f"GPU {gpu.index}: {format_bytes(gpu.free_bytes)} of {format_bytes(gpu.total_bytes)} "
            "free"
        )
        if gpu.processes or used > _BUSY * gpu.total_bytes:
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


def _holders(gpu: Gpu) -> str:
    if not gpu.processes:
        return f"{format_bytes(gpu.total_bytes - gpu.free_bytes)} held by processes not seen here"
    return "held by " + ", ".join(
        f"{each.name} ({each.pid}"
        + (f", {format_bytes(each.used_bytes)})" if each.used_bytes is not None else ")")
        for each in gpu.processes
    )


def read_gpus() -> tuple[list[Gpu], list[Pair], tuple[int, int] | None]:
    """Ask NVML for every visible GPU and pair of them, and for the CUDA version of the driver.

    Nothing without NVML. GPUs keep NVML's number, as nvidia-smi shows it.
    """
    try:
        import pynvml
    except ImportError:
        return [], [], None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return [], [], None
    try:
        count = pynvml.nvmlDeviceGetCount()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
        chosen: Sequence[int] = range(count)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is not None:
            uuids = [str(pynvml.nvmlDeviceGetUUID(handle)) for handle in handles]
            chosen = sorted(visible_indices(visible, uuids))
        gpus = [_read_gpu(pynvml, index, handles[index]) for index in chosen]
        pairs = [
            _read_pair(pynvml, first, second, handles) for first, second in combinations(chosen, 2)
        ]
        version = pynvml.nvmlSystemGetCudaDriverVersion_v2()
        return gpus, pairs, (version // 1000, version % 1000 // 10)
    finally:
        pynvml.nvmlShutdown()


def _read_gpu(nvml: Any, index: int, handle: Any) -> Gpu:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    running = _ask(nvml, lambda: nvml.nvmlDeviceGetComputeRunningProcesses(handle)) or []
    errors = _ask(
        nvml,
        lambda: nvml.nvmlDeviceGetTotalEccErrors(
            handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        ),
    )
    mig = _ask(nvml, lambda: nvml.nvmlDeviceGetMigMode(handle)[0])
    return Gpu(
        index=index,
        name=str(nvml.nvmlDeviceGetName(handle)),
        total_bytes=int(memory.total),
        free_bytes=int(memory.free),
        processes=tuple(
            Process(
                pid=int(each.pid),
                name=_name(nvml, int(each.pid)),
                used_bytes=None if each.usedGpuMemory is None else int(each.usedGpuMemory),
            )
            for each in running
        ),
        nvlinks=len(_peers(nvml, handle)),
        mig=bool(mig),
        uncorrected_errors=errors,
    )


def _read_pair(nvml: Any, first: int, second: int, handles: Sequence[Any]) -> Pair:
    one, two = handles[first], handles[second]
    names = {
        nvml.NVML_TOPOLOGY_INTERNAL: "same board",
        nvml.NVML_TOPOLOGY_SINGLE: "PIX",
        nvml.NVML_TOPOLOGY_MULTIPLE: "PXB",
        nvml.NVML_TOPOLOGY_HOSTBRIDGE: "PHB",
        nvml.NVML_TOPOLOGY_NODE: "NODE",
        nvml.NVML_TOPOLOGY_SYSTEM: "SYS",
    }
    # Behind a switch the far end of a link is the switch: both have links, and neither the other.
    ends_one, ends_two = _peers(nvml, one), _peers(nvml, two)
    bus = {_bus_id(nvml, one), _bus_id(nvml, two)}
    direct = bool((ends_one | ends_two) & bus)
    switched = bool(ends_one & ends_two - bus)
    level = _ask(nvml, lambda: nvml.nvmlDeviceGetTopologyCommonAncestor(one, two))
    path = "NVLink" if direct or switched else names.get(level, "unknown")
    status = [
        _ask(
            nvml, lambda a=a, b=b: nvml.nvmlDeviceGetP2PStatus(a, b, nvml.NVML_P2P_CAPS_INDEX_READ)
        )
        for a, b in ((one, two), (two, one))
    ]
    access = None if None in status else all(each == nvml.NVML_P2P_STATUS_OK for each in status)
    return Pair(first=first, second=second, path=path, peer_access=access)


def _bus_id(nvml: Any, handle: Any) -> str | None:
    found: str | None = _ask(nvml, lambda: str(nvml.nvmlDeviceGetPciInfo(handle).busId))
    return found


def _peers(nvml: Any, handle: Any) -> set[str | None]:
    """Return the bus ids at the far ends of the links that are up."""
    found: set[str | None] = set()
    for link in range(getattr(nvml, "NVML_NVLINK_MAX_LINKS", 18)):
        if _ask(nvml, lambda link=link: nvml.nvmlDeviceGetNvLinkState(handle, link)):
            found.add(
                _ask(
                    nvml,
                    lambda link=link: str(
                        nvml.nvmlDeviceGetNvLinkRemotePciInfo(handle, link).busId
                    ),
                )
            )
    return found - {None}


def _name(nvml: Any, pid: int) -> str:
    return str(_ask(nvml, lambda: nvml.nvmlSystemGetProcessName(pid)) or "a process")


def _ask(nvml: Any, question: Any) -> Any:
    """Return the answer, or None where this GPU or driver has none."""
    try:
        return question()
    except nvml.NVMLError:
        return None
