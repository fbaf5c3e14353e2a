"""`HardwareSpec`: the GPUs (or CPU ranks), their links and their host."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from autotune.errors import AutotuneError
from autotune.spec.gpus import CPU, GpuEntry, find_gpu, gpu_types, match_nvml_name
from autotune.spec.nvml import is_slice_name, nvml_devices
from autotune.spec.workload import Precision
from autotune.units import GIB

__all__ = [
    "GpuSpec", "HardwareSpec", "Link", "check_precision", "cpu_name", "detect_hardware",
    "detect_nodes", "gpu_types", "load_hardware",
]  # fmt: skip
_STAND_IN = "a100-80gb"
_LOG = logging.getLogger(__name__)

# NCCL, src/graph/tuning.cc: latency of one hop of a ring with the Simple protocol.
_HOP_S = {"nvlink": 3.4e-6, "infinity-fabric": 3.4e-6, "pcie": 5.7e-6}
_NETWORK_HOP_S = 9.6e-6

# Rough: one core of an Intel Xeon with AVX-512, PyTorch 2.13, a product of 1024-wide matrices and a
# large copy, measured once; the loopback link is an assumption. They rank trials on CPU ranks, and
# stand for no particular machine.
_CPU_CORE_FLOPS = {Precision.FP32: 120e9, Precision.BF16: 75e9}
_CPU_MEMORY_BYTES_PER_S = 10e9
_CPU_LINK_BYTES_PER_S = 1e9
_CPU_HOP_S = 100e-6
_CPU_NETWORK_BYTES_PER_S = 1e9 / 8
"""Gigabit Ethernet, assumed: what lies between hosts of CPU ranks is not known."""


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
    power_w: float | None = None
    """What the board may draw in the long run (TDP); None when it is unknown."""
    note: str = ""
    """What holds for every prediction on it."""
    fp8_flops: float | None = None
    """Dense FLOP/s of products of 8-bit floats that accumulate in fp32; None: it has none, or no
    figure is known."""

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
    """Of one node; of less than a node, the GPUs' share of it."""
    host_bytes_per_s: float
    """Memory bandwidth of one node's CPUs, what CPU Adam runs at; a share likewise."""

    @property
    def num_gpus(self) -> int:
        """Number of devices, which is the number of ranks."""
        return self.gpus_per_node * self.num_nodes

    def describe(self) -> str:
        """Return a short human text such as ``8 x h100-sxm``."""
        nodes = f" on {self.num_nodes} nodes" if self.num_nodes > 1 else ""
        unit = "cpu rank" + "s" * (self.num_gpus > 1) if self.gpu.is_cpu else self.gpu.name
        return f"{self.num_gpus} x {unit}{nodes}"


def load_hardware(
    gpu_type: str,
    num_gpus: int,
    memory_limit_bytes: int | None = None,
    *,
    one_node: bool = False,
) -> HardwareSpec:
    """Describe hardware by name; more GPUs than a node holds are whole nodes.

    Fewer of them have their share of its host: that is what comes with a GPU at a GPU's price.

    Args:
        gpu_type: A catalogue name or alias, the path of a YAML file (`gpus.GpuEntry`), or ``cpu``.
        num_gpus: Devices over all nodes.
        memory_limit_bytes: Lowers the memory of each device.
        one_node: All of them are in one machine, whatever the type's usual node holds.

    Raises:
        AutotuneError: an unknown name, or a count that is no whole number of nodes.
    """
    _check_count(num_gpus)
    if gpu_type.lower() == CPU:
        return _cpu_hardware(num_gpus, memory_limit_bytes)
    name, entry = find_gpu(gpu_type)
    hardware = _from_entry(name, entry, num_gpus, whole_nodes=not one_node)
    return _limit_memory(hardware, memory_limit_bytes)


def check_precision(gpu: GpuSpec, precision: Precision) -> None:
    """Refuse a precision the device has no matrix units for.

    Raises:
        AutotuneError: such as bf16 on a T4.
    """
    if precision not in gpu.peak_flops:
        has = ", ".join(f"--precision {known}" for known in gpu.peak_flops)
        raise AutotuneError(f"{gpu.name} has no {precision}. Use {has}, or another GPU.")


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
    names, told = nvml_devices()
    if num_gpus > len(names):
        raise AutotuneError(
            f"{num_gpus} GPUs asked for, {len(names)} found. Lower --gpus, or predict a larger "
            f"machine with 'autotune plan --gpus {num_gpus} --gpu-type TYPE'."
        )
    if num_gpus > 1 and any(map(is_slice_name, names[:num_gpus])):
        raise AutotuneError(
            f"{num_gpus} GPUs asked for, but {names[0]} is a slice of a GPU (MIG), of which CUDA "
            "shows a process one. Give --gpus 1, or whole GPUs: nvidia-smi -mig 0."
        )
    # A GPU without memory of its own takes its host's.
    memory = [_host_memory_bytes() // num_gpus if each is None else each for each in told]
    kind = match_nvml_name(names[0])
    name, entry = find_gpu(kind or _STAND_IN)
    hardware = _from_entry(name, entry, num_gpus, whole_nodes=False)
    gpu = hardware.gpu
    if kind is None:
        # Measuring needs no catalogue; predictions then only order what is measured.
        shared = told[0] is None
        where = "memory shared with the host, from /proc/meminfo" if shared else "memory from NVML"
        source = f"{where}; its speed is unknown, that of {_STAND_IN} stands in for it"
        _LOG.warning("GPU %s is not in the catalogue: %s.", names[0], source)
        gpu = replace(
            gpu,
            name=names[0],
            memory_bytes=min(memory[:num_gpus]),
            source=source,
            power_w=None,
        )
    usable = min(gpu.memory_bytes, *memory[:num_gpus])
    hardware = replace(
        hardware,
        gpu=replace(gpu, memory_bytes=usable),
        host_memory_bytes=_host_memory_bytes(),
        # The whole machine is at hand, however many of its GPUs are used.
        host_bytes_per_s=entry.host_gb_per_s * 1e9,
    )
    return _limit_memory(hardware, memory_limit_bytes)


def detect_nodes(
    num_gpus: int,
    num_nodes: int,
    device: Literal["cuda", "cpu"],
    memory_limit_bytes: int | None = None,
) -> HardwareSpec:
    """Describe equal hosts of which this machine is one.

    The network is not looked at: it is the GPU type's usual one, as in `load_hardware`.

    Args:
        num_gpus: Devices over all hosts, a multiple of `num_nodes`.
        num_nodes: Hosts.
        device: Of the ranks.
        memory_limit_bytes: Lowers the memory of each device.

    Raises:
        AutotuneError: no GPU, or fewer here than this host's share.
    """
    here = detect_hardware(num_gpus // num_nodes, device, memory_limit_bytes)
    if num_nodes == 1:
        return here
    if device == "cpu":
        share = _CPU_NETWORK_BYTES_PER_S / here.gpus_per_node
        network = Link(alpha_s=_CPU_HOP_S, bytes_per_s=share)
    else:
        kind = match_nvml_name(here.gpu.name) or here.gpu.name
        _, entry = find_gpu(kind if kind in gpu_types() else _STAND_IN)
        network = Link(alpha_s=_NETWORK_HOP_S, bytes_per_s=entry.nic_gb_per_s * 1e9)
        if num_gpus <= (entry.link_domain_gpus or 0):
            network = here.intra_node
    return replace(here, num_nodes=num_nodes, inter_node=network)


def _check_count(num_gpus: int) -> None:
    if num_gpus < 1:
        raise AutotuneError(f"The number of GPUs must be at least 1, not {num_gpus}.")


def _from_entry(
    name: str, entry: GpuEntry, num_gpus: int, whole_nodes: bool = True
) -> HardwareSpec:
    per_node = entry.gpus_per_node
    num_nodes = -(-num_gpus // per_node) if whole_nodes else 1
    if num_nodes > 1 and num_gpus % per_node:
        below = num_gpus - num_gpus % per_node
        raise AutotuneError(
            f"{num_gpus} GPUs are no whole number of nodes of {per_node}. "
            f"Nearest: {below} or {below + per_node}."
        )
    link = Link(alpha_s=_HOP_S[entry.link], bytes_per_s=entry.link_gb_per_s * 1e9)
    network = Link(alpha_s=_NETWORK_HOP_S, bytes_per_s=entry.nic_gb_per_s * 1e9)
    gpu = GpuSpec(
        name=name,
        memory_bytes=int(entry.memory_gib * GIB),
        hbm_bytes_per_s=entry.hbm_tb_per_s * 1e12,
        peak_flops={p: entry.tflops[p.value] * 1e12 for p in Precision if p.value in entry.tflops},
        host_link=Link(alpha_s=_NETWORK_HOP_S, bytes_per_s=entry.host_link_gb_per_s * 1e9),
        source=entry.provenance,
        power_w=entry.power_w,
        note=entry.note,
        fp8_flops=entry.tflops["fp8"] * 1e12 if "fp8" in entry.tflops else None,
    )
    share = min(1.0, num_gpus / per_node)
    return HardwareSpec(
        gpu=gpu,
        gpus_per_node=num_gpus // num_nodes,
        num_nodes=num_nodes,
        intra_node=link,
        inter_node=link if num_gpus <= (entry.link_domain_gpus or 0) else network,
        host_memory_bytes=int(entry.host_memory_gib * GIB * share),
        host_bytes_per_s=entry.host_gb_per_s * 1e9 * share,
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


def cpu_name() -> str:
    """Return what the processor calls itself, as /proc/cpuinfo has it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return ""


def _host_memory_bytes() -> int:
    """Return what this host may use: its memory, or the control group's limit below it."""
    fields = dict(
        line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line
    )
    total = int(fields["MemTotal"].split()[0]) * 1024
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return total if text == "max" else min(total, int(text))
