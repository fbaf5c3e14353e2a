"""Checks of the host: shared memory, limits of a process, memory against a model, leftovers."""

from __future__ import annotations

import os
import resource

from autotune.doctor.finding import Finding, Machine, broken, note, ok, warning
from autotune.units import GIB, MIB, format_bytes

_DOCKER_SHM_BYTES = 64 * MIB
"""Docker's default; NCCL between GPUs without peer access, and data loaders, need more."""
_SHM_BYTES = GIB
_OPEN_FILES = 4096
"""Each rank holds sockets to the others, data files and shards of a checkpoint open."""
_RANK_BYTES = 1.5 * GIB
"""Measured of a rank on CPU after its imports: docs/memory.md counts the model on top."""


def check_shared_memory(machine: Machine, *, ranks: int) -> list[Finding]:
    """Look how large /dev/shm is and what is free: NCCL and data loaders exchange through it."""
    path = machine.root / "dev/shm"
    try:
        found = os.statvfs(path)
    except OSError:
        return [
            warning(
                "shm", "there is no /dev/shm",
                "Mount one: NCCL without peer access and data loaders with workers need it.",
            )
        ]  # fmt: skip
    size, free = found.f_frsize * found.f_blocks, found.f_frsize * found.f_bavail
    seen = f"/dev/shm has {format_bytes(size)}, {format_bytes(free)} free"
    do = (
        "In a container start it with --ipc=host or --shm-size=8g; else remount: "
        "mount -o remount,size=8G /dev/shm."
    )
    if free <= _DOCKER_SHM_BYTES and ranks > 1:
        return [
            broken("shm", seen, f"{do} NCCL between GPUs fails without it (or NCCL_SHM_DISABLE=1, "
                   "slow).")
        ]  # fmt: skip
    if free < _SHM_BYTES:
        return [warning("shm", seen, do)]
    return [ok("shm", seen)]


def check_limits(*, infiniband: bool) -> list[Finding]:
    """Look at the limits of this process, which the ranks inherit.

    Args:
        infiniband: Whether there are adapters: they pin the memory they read.
    """
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    data, _ = resource.getrlimit(resource.RLIMIT_DATA)
    found = []
    if files != resource.RLIM_INFINITY and files < _OPEN_FILES:
        found.append(
            warning("nofile", f"{files} open files a process at most",
                    "ulimit -n 65536 before the run (container: --ulimit nofile=65536).")
        )  # fmt: skip
    else:
        found.append(ok("nofile", f"open files: {_limit_words(files)}"))
    if locked != resource.RLIM_INFINITY:
        seen = f"{format_bytes(locked)} of locked memory a process at most"
        do = "ulimit -l unlimited before the run (container: --ulimit memlock=-1)."
        if infiniband:
            found.append(broken("memlock", seen, f"{do} InfiniBand pins what it sends."))
        else:
            found.append(note("memlock", seen, f"Where hosts are joined by InfiniBand: {do}"))
    else:
        found.append(ok("memlock", "locked memory: unlimited"))
    if data != resource.RLIM_INFINITY:
        found.append(
            warning("data", f"{format_bytes(data)} of data a process at most (RLIMIT_DATA)",
                    "ulimit -d unlimited, unless the limit is meant: a rank's imports alone take "
                    f"{format_bytes(int(_RANK_BYTES))} of it.")
        )  # fmt: skip
    return found


def available_bytes(machine: Machine) -> int | None:
    """Return the memory that processes here can still take: the host's, or the container's.

    A container's own use counts the pages of files it has read, which the kernel takes back when
    they are needed: after one reading of large weights they alone can reach the limit.
    """
    text = machine.read("proc/meminfo") or ""
    kib = [line.split()[1] for line in text.splitlines() if line.startswith("MemAvailable:")]
    if not kib:
        return None
    free = int(kib[0]) * 1024
    limit, used = machine.read("sys/fs/cgroup/memory.max"), machine.read(
        "sys/fs/cgroup/memory.current"
    )  # fmt: skip
    if limit and limit.isdecimal() and used and used.isdecimal():
        held = int(used) - _file_pages_bytes(machine)
        free = min(free, max(0, int(limit) - held))
    return free


def _file_pages_bytes(machine: Machine) -> int:
    """Return the container's pages that are copies of files, without those of /dev/shm."""
    lines = (machine.read("sys/fs/cgroup/memory.stat") or "").splitlines()
    pages = dict(line.split() for line in lines if len(line.split()) == 2)
    return sum(int(pages.get(name, 0)) for name in ("active_file", "inactive_file"))


def check_host_memory(
    machine: Machine, *, num_parameters: int | None, model: str, ranks: int
) -> list[Finding]:
    """Hold the host's free memory against what loading and offloading a model take.

    Rank 0 reads the weights as fp32 (4 bytes a parameter) before they are sharded, whatever the
    engine; offloaded AdamW states are 12 bytes a parameter, and gradients 4 more.

    Args:
        machine: Where to look.
        num_parameters: Of the model; None judges the ranks alone.
        model: What to call it.
        ranks: Processes on this host.
    """
    free = available_bytes(machine)
    if free is None:
        return [note("host_memory", "/proc/meminfo says nothing of available memory")]
    base = int(ranks * _RANK_BYTES)
    seen = f"{format_bytes(free)} of host memory available"
    if num_parameters is None:
        if free < base:
            return [
                broken("host_memory", f"{seen}; {ranks} ranks take about {format_bytes(base)} "
                       "before any model", "End what else runs here, or use fewer ranks.")
            ]  # fmt: skip
        return [ok("host_memory", seen)]
    load, offload = base + 4 * num_parameters, base + 16 * num_parameters
    needs = f"{seen}; loading {model} on {ranks} ranks takes about {format_bytes(load)}"
    if free < load:
        return [
            broken("host_memory", needs, "A rank would be killed (exit code -9). Use a host with "
                   "more memory, or fewer ranks on it.")
        ]  # fmt: skip
    if free < offload:
        return [
            warning("host_memory", f"{needs}, its offloaded states about {format_bytes(offload)}",
                    "Leave strategies with offload out (--strategies zero3,fsdp2), or shard over "
                    "more hosts.")
        ]  # fmt: skip
    return [ok("host_memory", f"{needs}, offloaded states {format_bytes(offload)}")]


def check_extension_locks(machine: Machine) -> list[Finding]:
    """Look for locks of native builds: a rank killed in one leaves it, and the next waits on it."""
    given = machine.variables.get("TORCH_EXTENSIONS_DIR")
    folder = machine.home / ".cache/torch_extensions" if given is None else machine.root / given
    locks = sorted(folder.glob("**/lock"))
    if not locks:
        return [ok("native_locks", "no native build is locked")]
    shown = ", ".join(str(path) for path in locks[:3])
    return [
        warning("native_locks", f"locked: {shown}",
                "If no build is running now, remove them: a run that needs the operator waits on a "
                "lock for ever.")
    ]  # fmt: skip


def _limit_words(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)
