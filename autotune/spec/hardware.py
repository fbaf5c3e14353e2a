"""`HardwareSpec`: the GPUs (or CPU ranks), their links and their host."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from autotune.errors import AutotuneError, nearest
from autotune.spec.catalogue import read_catalogue
from autotune.spec.workload import Precision
from autotune.units import GIB

GPUS_PER_NODE = 8
CPU = "cpu"
_STAND_IN = "a100-80gb"
_LOG = logging.getLogger(__name__)

# NCCL, src/graph/tuning.cc: latency of one hop of a ring with the Simple protocol.
_NVLINK_HOP_S = 3.4e-6
_NETWORK_HOP_S = 9.6e-6

# Rough: one core of an Intel Xeon with AVX-512, PyTorch 2.13, a product of 1024-wide matrices and a
# large copy, measured once; the loopback link is an assumption. They rank trials on CPU ranks, and
# stand for no particular machine.
_CPU_CORE_FLOPS = {Precision.FP32: 120e9, Precision.BF16: 75e9}
_CPU_MEMORY_BYTES_PER_S = 10e9
_CPU_LINK_BYTES_PER_S = 1e9
_CPU_HOP_S = 100e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """A connection, one direction, seen from one GPU."""

    alpha_s: float
    """Latency of one hop."""
    bytes_per_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuSpec:
    """One device. On `cpu` it is one rank's share of the machine."""

    name: str
    memory_bytes: int
    """What one process may allocate, CUDA context included."""
    hbm_bytes_per_s: float
    peak_flops: Mapping[Precision, float]
    """Dense FLOP/s of matrix products, by the precision of a run."""
    host_link: Link
    """Between the device and its host's memory."""
    source: str

    @property
    def is_cpu(self) -> bool:
        """Whether the ranks are CPU processes."""
        return self.name == CPU


@dataclass(frozen=True, kw_only=True, slots=True)
class HardwareSpec:
    """Equal nodes of equal devices."""

    gpu: GpuSpec
    gpus_per_node: int
    num_nodes: int
    intra_node: Link
    inter_node: Link
    """One device's share of the network; a ring over whole nodes uses every device's."""
    host_memory_bytes: int
    """Of one node."""
    host_bytes_per_s: float
    """Memory bandwidth of one node's CPUs, what CPU Adam runs at."""

    @property
    def num_gpus(self) -> int:
        """Number of devices, which is the number of ranks."""
        return self.gpus_per_node * self.num_nodes

    def describe(self) -> str:
        """Return a short human text such as ``8 x h100-sxm``."""
        nodes = f" on {self.num_nodes} nodes" if self.num_nodes > 1 else ""
        unit = "cpu rank" + "s" * (self.num_gpus > 1) if self.gpu.is_cpu else self.gpu.name
        return f"{self.num_gpus} x {unit}{nodes}"


def gpu_types() -> list[str]:
    """Return the names `load_hardware` knows, aliases left out."""
    return [*read_catalogue("gpus"), CPU]


def load_hardware(
    gpu_type: str, num_gpus: int, memory_limit_bytes: int | None = None
) -> HardwareSpec:
    """Describe hardware by name; more than 8 GPUs are whole nodes of 8.

    Args:
        gpu_type: A catalogue name or alias, or ``cpu``.
        num_gpus: Devices over all nodes.
        memory_limit_bytes: Lowers the memory of each device.

    Raises:
        AutotuneError: an unknown name, or a count that is no whole number of nodes.
    """
    _check_count(num_gpus)
    entries = read_catalogue("gpus")
    names = {alias: key for key, entry in entries.items() for alias in (key, *entry["aliases"])}
    wanted = gpu_type.lower()
    if wanted == CPU:
        return _cpu_hardware(num_gpus, memory_limit_bytes)
    if wanted not in names:
        raise AutotuneError(
            f"Unknown GPU type {gpu_type!r}.{nearest(gpu_type, [*names, CPU])} "
            f"Known: {', '.join(gpu_types())}."
        )
    hardware = _from_entry(names[wanted], entries[names[wanted]], num_gpus)
    return _limit_memory(hardware, memory_limit_bytes)


def detect_hardware(
    num_gpus: int, device: Literal["cuda", "cpu"], memory_limit_bytes: int | None = None
) -> HardwareSpec:
    """Describe this machine's devices.

    Raises:
        AutotuneError: no GPU, or fewer than asked for.
    """
    _check_count(num_gpus)
    if device == "cpu":
        return _cpu_hardware(num_gpus, memory_limit_bytes)
    names, memory = _nvml_devices()
    if num_gpus > len(names):
        raise AutotuneError(
            f"{num_gpus} GPUs asked for, {len(names)} found. Lower --gpus, or predict a larger "
            f"machine with 'autotune plan --gpus {num_gpus} --gpu-type TYPE'."
        )
    entries = read_catalogue("gpus")
    kind = next((k for k, e in entries.items() if _matches(names[0], e["nvml_names"])), None)
    hardware = _from_entry(kind or _STAND_IN, entries[kind or _STAND_IN], num_gpus, False)
    gpu = hardware.gpu
    if kind is None:
        # Measuring needs no catalogue; predictions then only order what is measured.
        source = f"memory from NVML; its speed is unknown, that of {_STAND_IN} stands in for it"
        _LOG.warning("GPU %s is not in the catalogue: %s.", names[0], source)
        gpu = replace(gpu, name=names[0], memory_bytes=min(memory[:num_gpus]), source=source)
    usable = min(gpu.memory_bytes, *memory[:num_gpus])
    hardware = replace(
        hardware,
        gpu=replace(gpu, memory_bytes=usable),
        host_memory_bytes=_host_memory_bytes(),
    )
    return _limit_memory(hardware, memory_limit_bytes)


def _matches(device_name: str, known: list[str]) -> bool:
    return any(device_name.removeprefix("NVIDIA ") == name for name in known)


def _check_count(num_gpus: int) -> None:
    if num_gpus < 1:
        raise AutotuneError(f"The number of GPUs must be at least 1, not {num_gpus}.")


def _from_entry(
    name: str, entry: dict[str, Any], num_gpus: int, whole_nodes: bool = True
) -> HardwareSpec:
    num_nodes = -(-num_gpus // GPUS_PER_NODE) if whole_nodes else 1
    if num_gpus % num_nodes or (num_nodes > 1 and num_gpus % GPUS_PER_NODE):
        below = num_gpus - num_gpus % GPUS_PER_NODE
        raise AutotuneError(
            f"{num_gpus} GPUs are no whole number of nodes of {GPUS_PER_NODE}. "
            f"Nearest: {below} or {below + GPUS_PER_NODE}."
        )
    gpu = GpuSpec(
        name=name,
        memory_bytes=int(entry["memory_gib"] * GIB),
        hbm_bytes_per_s=entry["hbm_tb_per_s"] * 1e12,
        peak_flops={Precision(key): value * 1e12 for key, value in entry["tflops"].items()},
        host_link=Link(alpha_s=_NETWORK_HOP_S, bytes_per_s=entry["pcie_gb_per_s"] * 1e9),
        source=entry["source"],
    )
    return HardwareSpec(
        gpu=gpu,
        gpus_per_node=num_gpus // num_nodes,
        num_nodes=num_nodes,
        intra_node=Link(alpha_s=_NVLINK_HOP_S, bytes_per_s=entry["link_gb_per_s"] * 1e9),
        inter_node=Link(alpha_s=_NETWORK_HOP_S, bytes_per_s=entry["nic_gb_per_s"] * 1e9),
        host_memory_bytes=int(entry["host_memory_gib"] * GIB),
        host_bytes_per_s=entry["host_gb_per_s"] * 1e9,
    )


def _limit_memory(hardware: HardwareSpec, limit: int | None) -> HardwareSpec:
    if limit is None:
        return hardware
    lowered = min(limit, hardware.gpu.memory_bytes)
    return replace(hardware, gpu=replace(hardware.gpu, memory_bytes=lowered))


def _cpu_hardware(num_ranks: int, memory_limit_bytes: int | None) -> HardwareSpec:
    """Split this machine's memory and cores over the ranks of one node."""
    host_memory = _host_memory_bytes()
    cores = len(os.sched_getaffinity(0)) / num_ranks
    link = Link(alpha_s=_CPU_HOP_S, bytes_per_s=_CPU_LINK_BYTES_PER_S)
    gpu = GpuSpec(
        name=CPU,
        memory_bytes=host_memory // num_ranks,
        hbm_bytes_per_s=_CPU_MEMORY_BYTES_PER_S / num_ranks,
        peak_flops={key: value * cores for key, value in _CPU_CORE_FLOPS.items()},
        host_link=Link(alpha_s=0.0, bytes_per_s=_CPU_MEMORY_BYTES_PER_S / num_ranks),
        source="rough rates of one x86 core, not of this machine; memory from /proc/meminfo",
    )
    hardware = HardwareSpec(
        gpu=gpu,
        gpus_per_node=num_ranks,
        num_nodes=1,
        intra_node=link,
        inter_node=link,
        host_memory_bytes=host_memory,
        host_bytes_per_s=_CPU_MEMORY_BYTES_PER_S,
    )
    return _limit_memory(hardware, memory_limit_bytes)


def _host_memory_bytes() -> int:
    """Return what this host may use: its memory, or the control group's limit below it."""
    fields = dict(
        line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line
    )
    total = int(fields["MemTotal"].split()[0]) * 1024
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return total if text == "max" else min(total, int(text))


def _visible_indices(visible: str, uuids: list[str]) -> list[int]:
    """Read CUDA_VISIBLE_DEVICES as CUDA does: numbers or UUID prefixes, up to the first unknown."""
    chosen = []
    for word in (part.strip() for part in visible.split(",")):
        if word.isdigit() and int(word) < len(uuids):
            chosen.append(int(word))
            continue
        matches = [index for index, uuid in enumerate(uuids) if word and uuid.startswith(word)]
        if len(matches) != 1:
            break
        chosen.append(matches[0])
    return chosen


def _nvml_devices() -> tuple[list[str], list[int]]:
    """Return the names and total memory of the GPUs NVML sees."""
    none_found = AutotuneError(
        "No NVIDIA GPU found. Predict without one with 'autotune plan --gpu-type TYPE' "
        f"(TYPE: {', '.join(gpu_types())}), or run on CPU processes with --device cpu."
    )
    try:
        import pynvml
    except ImportError as error:
        raise AutotuneError(
            "Finding GPUs needs nvidia-ml-py: pip install 'autotune-llm[train]'. Without it use "
            "'autotune plan --gpu-type TYPE', or --device cpu."
        ) from error
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise none_found from error
    try:
        handles = [
            pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())
        ]
        names = [pynvml.nvmlDeviceGetName(handle) for handle in handles]
        memory = [pynvml.nvmlDeviceGetMemoryInfo(handle).total for handle in handles]
        uuids = [str(pynvml.nvmlDeviceGetUUID(handle)) for handle in handles]
    finally:
        pynvml.nvmlShutdown()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        chosen = _visible_indices(visible, uuids)
        names, memory = [names[index] for index in chosen], [memory[index] for index in chosen]
    if not names:
        raise none_found
    return names, memory
