"""What NVML tells of the visible GPUs and of how they are joined."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

from autotune.doctor.gpus import Gpu, Pair, Process
from autotune.spec.nvml import (
    NoGpuError,
    VisibleGpu,
    ask_nvml,
    memory_of,
    nvml_session,
    visible_gpus,
)


def read_gpus() -> tuple[list[Gpu], list[Pair], tuple[int, int] | None]:
    """Ask NVML for every visible GPU and pair of them, and for the CUDA version of the driver.

    Nothing without NVML. GPUs are numbered as CUDA does, and so are the ranks of a run.

    Raises:
        AutotuneError: CUDA_VISIBLE_DEVICES names none of those that are here, or NVML fails.
    """
    try:
        with nvml_session() as nvml:
            visible = visible_gpus(nvml)
            gpus = [_read_gpu(nvml, number, gpu) for number, gpu in enumerate(visible)]
            handles = [gpu.handle for gpu in visible]
            pairs = [
                _read_pair(nvml, first, second, handles)
                for first, second in combinations(range(len(handles)), 2)
            ]
            version = nvml.nvmlSystemGetCudaDriverVersion_v2()
    except (ImportError, NoGpuError):
        return [], [], None
    return gpus, pairs, (version // 1000, version % 1000 // 10)


def _read_gpu(nvml: Any, number: int, gpu: VisibleGpu) -> Gpu:
    handle = gpu.handle
    memory = memory_of(nvml, handle)
    running = ask_nvml(nvml, lambda: nvml.nvmlDeviceGetComputeRunningProcesses(handle)) or []
    errors = ask_nvml(
        nvml,
        lambda: nvml.nvmlDeviceGetTotalEccErrors(
            handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        ),
    )
    mode = ask_nvml(nvml, lambda: nvml.nvmlDeviceGetMigMode(handle)[0])
    return Gpu(
        index=number,
        nvml_index=gpu.nvml_index,
        name=str(nvml.nvmlDeviceGetName(handle)),
        total_bytes=None if memory is None else int(memory.total),
        free_bytes=None if memory is None else int(memory.free),
        processes=tuple(
            Process(
                pid=int(each.pid),
                name=_name(nvml, int(each.pid)),
                used_bytes=None if each.usedGpuMemory is None else int(each.usedGpuMemory),
            )
            for each in running
        ),
        nvlinks=len(_peers(nvml, handle)),
        mig=gpu.is_slice or bool(mode),
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
    level = ask_nvml(nvml, lambda: nvml.nvmlDeviceGetTopologyCommonAncestor(one, two))
    path = "NVLink" if direct or switched else names.get(level, "unknown")
    status = [
        ask_nvml(
            nvml, lambda a=a, b=b: nvml.nvmlDeviceGetP2PStatus(a, b, nvml.NVML_P2P_CAPS_INDEX_READ)
        )
        for a, b in ((one, two), (two, one))
    ]
    access = None if None in status else all(each == nvml.NVML_P2P_STATUS_OK for each in status)
    return Pair(first=first, second=second, path=path, peer_access=access)


def _bus_id(nvml: Any, handle: Any) -> str | None:
    found: str | None = ask_nvml(nvml, lambda: str(nvml.nvmlDeviceGetPciInfo(handle).busId))
    return found


def _peers(nvml: Any, handle: Any) -> set[str | None]:
    """Return the bus ids at the far ends of the links that are up."""
    found: set[str | None] = set()
    for link in range(getattr(nvml, "NVML_NVLINK_MAX_LINKS", 18)):
        if ask_nvml(nvml, lambda link=link: nvml.nvmlDeviceGetNvLinkState(handle, link)):
            found.add(
                ask_nvml(
                    nvml,
                    lambda link=link: str(
                        nvml.nvmlDeviceGetNvLinkRemotePciInfo(handle, link).busId
                    ),
                )
            )
    return found - {None}


def _name(nvml: Any, pid: int) -> str:
    return str(ask_nvml(nvml, lambda: nvml.nvmlSystemGetProcessName(pid)) or "a process")
