"""What this process has mapped: signs of CUDA, and the file pages that a fork leaves behind."""

from __future__ import annotations

import ctypes
import mmap
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

_MADV_POPULATE_READ = 22  # Linux 5.14
_PRESENT, _OF_FILE = np.uint64(1 << 63), np.uint64(1 << 61)  # proc(5), pagemap
_DEVICE = re.compile(r"nvidia(\d+|ctl|-uvm)")

Span = tuple[int, int]
"""Addresses: the first byte, and the first one behind."""


def touched_cuda(maps: str | None = None) -> bool:
    """Say whether this process has used CUDA's driver: what is forked then cannot.

    The sign is the driver's library together with a device file of NVIDIA's, both mapped: CUDA's
    first call opens and maps the devices, while the library alone may be a dependency of another,
    and NVML, which counts GPUs for torch, has a library of its own.

    Args:
        maps: text of /proc/self/maps; read when None.
    """
    text = Path("/proc/self/maps").read_text() if maps is None else maps
    names = {line.rpartition("/")[2] for line in text.splitlines() if "/" in line}
    driver = any(name.startswith("libcuda.so") for name in names)
    return driver and any(_DEVICE.fullmatch(name) for name in names)


def resident_file_pages() -> list[Span]:
    """Return where pages of mapped files are resident, from /proc/self/pagemap."""
    page = mmap.PAGESIZE
    found: list[Span] = []
    with Path("/proc/self/pagemap").open("rb") as pagemap:
        for line in Path("/proc/self/maps").read_text().splitlines():
            span, _, _, _, inode = line.split()[:5]
            if inode == "0":
                continue
            first, end = (int(address, 16) for address in span.split("-"))
            pagemap.seek(first // page * 8)
            entries = np.frombuffer(pagemap.read((end - first) // page * 8), dtype=np.uint64)
            resident = ((entries & _PRESENT) != 0) & ((entries & _OF_FILE) != 0)
            edges = np.flatnonzero(np.diff(np.concatenate([[False], resident, [False]])))
            found += [
                (first + int(start) * page, first + int(stop) * page)
                for start, stop in edges.reshape(-1, 2)
            ]
    return found


def populate(spans: Iterable[Span]) -> None:
    """Map file pages that a fork left out, so that the resident set is what it was.

    A fork copies the page table of private memory only; a file's pages come back one by one as they
    are touched, and would count as memory that training took.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for first, end in spans:
        if libc.madvise(first, end - first, _MADV_POPULATE_READ):
            for address in range(first, end, mmap.PAGESIZE):  # an older kernel
                ctypes.string_at(address, 1)


def show_environment(variables: dict[str, str], first: Iterable[str]) -> None:
    """Write variables where /proc/PID/environ reads: a fork keeps showing its parent's there.

    Launches find their processes by that. Call it after `os.environ` was rewritten: the C library
    keeps its copies elsewhere by then.

    Args:
        variables: the process's environment.
        first: the names to write first; those at the end are cut where there is no more room.
    """
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[47]), int(fields[48])  # env_start and env_end of proc(5)
    order = {name: variables[name] for name in first if name in variables} | variables
    block = b"".join(f"{name}={value}\0".encode() for name, value in order.items())
    room = end - start
    if len(block) > room:
        block = block[: block.rfind(b"\0", 0, room) + 1]
    ctypes.memmove(start, block.ljust(room, b"\0"), room)
