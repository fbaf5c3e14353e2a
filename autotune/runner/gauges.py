"""Clocks, memory gauges and memory limits of one rank, on CUDA and on CPU."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from autotune.trial.memory_left import TWO_STACKS_BYTES
from autotune.trial.protocol import Outcome

_LIBRARY_ERRORS = (RuntimeError, OSError, SystemError)
MEMORY_ERRORS = (*_LIBRARY_ERRORS, MemoryError)
"""Every kind of exception `memory_outcome` may call out of memory."""
_CUDA_OOM_TEXTS = (
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "failure 2 'out of memory'",
)
_CPU_OOM_TEXTS = ("can't allocate memory", "could not create a memory", "std::bad_alloc")


@dataclass(frozen=True, kw_only=True, slots=True)
class Peak:
    """Highest memory use since the last reset, in bytes above the baseline."""

    allocated_bytes: int
    reserved_bytes: int
    alloc_retries: int
    device_used_bytes: int | None = None
    """CUDA: taken on the whole device, as NVML counts it; context and libraries are in it."""
    device_total_bytes: int | None = None
    """CUDA: what the device has."""


class CudaGauge:
    """The caching allocator's own account."""

    def __init__(self) -> None:
        self.baseline_bytes = 0
        self._retries = 0

    def set_baseline(self) -> None:
        """Note what the CUDA context took before the model was built."""
        free, total = torch.cuda.mem_get_info()
        self.baseline_bytes = total - free

    def limit(self, num_bytes: int) -> None:
        """Let the allocator have no more than this; it raises OutOfMemoryError above."""
        total = torch.cuda.get_device_properties().total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, num_bytes / total))

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Do nothing: the allocator counts tensors alone."""
        yield

    def at_limit(self) -> bool:
        """Say no: the allocator raises its own error at the limit, so nothing has to be guessed."""
        return False

    def lift_limit(self) -> None:
        """Do nothing: reporting a failure takes host memory alone."""

    def reset(self) -> None:
        """Start a new peak, without the cache that an earlier, differently shaped rung left."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self._retries = torch.cuda.memory_stats().get("num_alloc_retries", 0)

    def read(self) -> Peak:
        """Return the peak since `reset`.

        The allocator gives nothing back to the device by itself, so what the device has given by
        now is the peak of that as well.
        """
        free, total = torch.cuda.mem_get_info()
        return Peak(
            allocated_bytes=torch.cuda.max_memory_allocated(),
            reserved_bytes=torch.cuda.max_memory_reserved(),
            alloc_retries=torch.cuda.memory_stats().get("num_alloc_retries", 0) - self._retries,
            device_used_bytes=total - free,
            device_total_bytes=total,
        )

    def now_s(self) -> float:
        """Wait for the device, then return the clock."""
        torch.cuda.synchronize()
        return time.perf_counter()


class CpuGauge:
    """The process's own account: the CPU allocator keeps none.

    With MALLOC_MMAP_THRESHOLD_=65536 (set by the launcher) every larger block goes back to the
    kernel when freed, so the resident peak and VmData follow the live tensors closely. They still
    hold more than tensors (code pages, thread stacks): an upper bound, not an allocator's count.
    """

    def __init__(self) -> None:
        self.baseline_bytes = 0
        self._resident_baseline = 0
        self._ceiling: int | None = None

    def set_baseline(self) -> None:
        """Note VmData and the resident set after the imports."""
        self.baseline_bytes = _status_bytes("VmData")
        self._resident_baseline = _status_bytes("VmRSS")

    def limit(self, num_bytes: int) -> None:
        """Make allocations fail above the baseline plus this many bytes, through RLIMIT_DATA."""
        self._ceiling = self.baseline_bytes + num_bytes
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (self._ceiling, hard))

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Add to the baseline by how much VmData grows inside.

        For the threads of process groups: each maps a stack of 8 MiB and touches little of it.
        """
        before, ceiling = _status_bytes("VmData"), self._ceiling
        self.lift_limit()
        yield
        grown = _status_bytes("VmData") - before
        limit = None if ceiling is None else ceiling - self.baseline_bytes
        self.baseline_bytes += grown
        if limit is not None:
            self.limit(limit)

    def at_limit(self) -> bool:
        """Say whether so little is left below the limit that a failure now is the limit's doing.

        Libraries report it in their own words: threads as "Resource temporarily unavailable",
        oneDNN as "could not create a primitive".
        """
        return (
            self._ceiling is not None and self._ceiling - _status_bytes("VmData") < TWO_STACKS_BYTES
        )

    def lift_limit(self) -> None:
        """Take the limit away."""
        if self._ceiling is not None:
            hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
            resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
            self._ceiling = None

    def reset(self) -> None:
        """Start a new resident peak (the kernel's `clear_refs` value 5, see proc(5))."""
        Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> Peak:
        """Return the peak since `reset`.

        VmData, which the limit acts on, has no peak of its own in proc(5): reserved is what it is
        now or the resident peak, whichever is more, a lower bound of its true peak.
        """
        resident = max(0, _status_bytes("VmHWM") - self._resident_baseline)
        data = max(0, _status_bytes("VmData") - self.baseline_bytes)
        return Peak(allocated_bytes=resident, reserved_bytes=max(resident, data), alloc_retries=0)

    def now_s(self) -> float:
        """Return the clock."""
        return time.perf_counter()


Gauge = CudaGauge | CpuGauge


def make_gauge(device: str) -> Gauge:
    """Return the gauge of a device kind."""
    return CudaGauge() if device == "cuda" else CpuGauge()


def memory_outcome(error: BaseException, gauge: Gauge | None = None) -> Outcome | None:
    """Say whether an exception means that memory ran out; the rank says so, nobody greps logs.

    Args:
        error: what stopped the rank.
        gauge: with it, an error of a library at the very limit counts, whatever it says.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return Outcome.OOM
    # What the device's memory refuses, past the caching allocator: handles, NCCL's buffers.
    if isinstance(error, RuntimeError) and any(text in str(error) for text in _CUDA_OOM_TEXTS):
        return Outcome.OOM
    refused = isinstance(error, RuntimeError) and any(t in str(error) for t in _CPU_OOM_TEXTS)
    if refused or (isinstance(error, OSError) and error.errno == 12):  # ENOMEM
        return Outcome.HOST_OOM if isinstance(gauge, CudaGauge) else Outcome.OOM
    if gauge is not None and isinstance(error, _LIBRARY_ERRORS) and gauge.at_limit():
        return Outcome.OOM
    return None


def peak_resident_bytes() -> int:
    """Return the process's resident peak so far: the host memory a rank needed."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(f"/proc/self/status has no {key}")
