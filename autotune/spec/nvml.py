"""The GPUs that NVML sees and CUDA_VISIBLE_DEVICES lets through, slices of GPUs (MIG) included."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from autotune.errors import AutotuneError

_HIDING = ("", "-1", "NoDevFiles")
"""Values of CUDA_VISIBLE_DEVICES that are meant to hide every GPU."""


class NoGpuError(AutotuneError):
    """There is no GPU, none is to be seen, or there is no way to look for one."""

    def __init__(self, message: str = "") -> None:
        super().__init__(
            message
            or "No NVIDIA GPU found. Predict without one with 'autotune plan --gpu-type TYPE' "
            "(h100-sxm, a100-80gb, rtx-4090 ...), or run on CPU processes with --device cpu."
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class VisibleGpu:
    """A GPU, or a slice of one, that CUDA shows; its place in the list is CUDA's number."""

    handle: Any
    """NVML's."""
    nvml_index: int
    """NVML's number of the GPU, as nvidia-smi shows it; of a slice, of the GPU it is cut from."""
    names: tuple[str, ...]
    """What CUDA_VISIBLE_DEVICES may call it, its UUID first."""
    is_slice: bool = False


def nvml_devices() -> tuple[list[str], list[int | None]]:
    """Return the names and total memory of the visible GPUs.

    The memory, in bytes, is None where the GPU has none of its own and shares its host's.

    Raises:
        NoGpuError: no GPU, or no way to look for one.
        AutotuneError: CUDA_VISIBLE_DEVICES names none of those that are here, or NVML fails.
    """
    try:
        with nvml_session() as nvml:
            found = visible_gpus(nvml)
            names = [str(nvml.nvmlDeviceGetName(gpu.handle)) for gpu in found]
            memory = [memory_of(nvml, gpu.handle) for gpu in found]
    except ImportError as error:
        raise NoGpuError(
            "Finding GPUs needs nvidia-ml-py: pip install 'autotune-llm[train]'. Without it use "
            "'autotune plan --gpu-type TYPE', or --device cpu."
        ) from error
    if not names:
        raise NoGpuError
    return names, [None if told is None else int(told.total) for told in memory]


def nvml_driver() -> str:
    """Return the version of NVIDIA's driver; needs what `nvml_devices` needs."""
    with nvml_session() as nvml:
        return str(nvml.nvmlSystemGetDriverVersion())


@contextmanager
def nvml_session() -> Iterator[Any]:
    """Give NVML, open.

    Raises:
        ImportError: there is no nvidia-ml-py.
        NoGpuError: no driver answers.
        AutotuneError: an answer that is needed is not given.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise NoGpuError from error
    try:
        yield pynvml
    except pynvml.NVMLError as error:
        raise AutotuneError(
            f"NVIDIA's driver does not answer: {error}. See whether nvidia-smi works, leave a GPU "
            "that is lost out with CUDA_VISIBLE_DEVICES, or run with --device cpu."
        ) from error
    finally:
        pynvml.nvmlShutdown()


def visible_gpus(nvml: Any) -> list[VisibleGpu]:
    """Return what CUDA shows, in its order: of a GPU in MIG mode its first slice, or those named.

    Raises:
        AutotuneError: CUDA_VISIBLE_DEVICES names nothing that is here.
    """
    whole = [_gpu(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
    slices = {gpu.nvml_index: _slices(nvml, gpu) for gpu in whole}
    numbered = [(slices[gpu.nvml_index] or [gpu])[0] for gpu in whole]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return numbered
    every = [*whole, *(each for some in slices.values() for each in some)]
    chosen = []
    for word in (part.strip() for part in visible.split(",")):
        found = _named(word, numbered, every)
        if found is None:
            break  # as CUDA does: up to the first unknown
        chosen.append(found)
    if not chosen and every and visible.strip() not in _HIDING:
        raise AutotuneError(
            f"CUDA_VISIBLE_DEVICES={visible} names no GPU of this machine. Here are "
            f"{', '.join(_words(gpu) for gpu in every)}: give numbers or UUIDs of these, or unset "
            "it."
        )
    return chosen


def memory_of(nvml: Any, handle: Any) -> Any:
    """Return NVML's memory information; None where a GPU has no memory of its own, such as GB10."""
    try:
        return nvml.nvmlDeviceGetMemoryInfo(handle)
    except nvml.NVMLError_NotSupported:
        return None


def ask_nvml(nvml: Any, question: Any) -> Any:
    """Return the answer, or None where this GPU or driver has none."""
    try:
        return question()
    except nvml.NVMLError:
        return None


def is_slice_name(name: str) -> bool:
    """Say whether NVML's name of a device is a slice's: ``NVIDIA A100-SXM4-40GB MIG 1g.5gb``."""
    return " MIG " in name


def _gpu(nvml: Any, index: int) -> VisibleGpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    return VisibleGpu(handle=handle, nvml_index=index, names=(str(nvml.nvmlDeviceGetUUID(handle)),))


def _slices(nvml: Any, gpu: VisibleGpu) -> list[VisibleGpu]:
    """Return the slices of a GPU; none where it is not in MIG mode."""
    mode = ask_nvml(nvml, lambda: nvml.nvmlDeviceGetMigMode(gpu.handle)[0])
    most = ask_nvml(nvml, lambda: int(nvml.nvmlDeviceGetMaxMigDeviceCount(gpu.handle)))
    found = []
    for number in range(most or 0) if mode else ():
        handle = ask_nvml(
            nvml, lambda n=number: nvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu.handle, n)
        )
        if handle is None:  # not every place holds one
            continue
        names = [str(nvml.nvmlDeviceGetUUID(handle))]
        parts = [
            ask_nvml(nvml, lambda h=handle: nvml.nvmlDeviceGetGpuInstanceId(h)),
            ask_nvml(nvml, lambda h=handle: nvml.nvmlDeviceGetComputeInstanceId(h)),
        ]
        if None not in parts:  # the name before drivers of 470
            names.append(f"MIG-{gpu.names[0]}/{parts[0]}/{parts[1]}")
        found.append(
            VisibleGpu(handle=handle, nvml_index=gpu.nvml_index, names=tuple(names), is_slice=True)
        )
    return found


def _named(
    word: str, numbered: Sequence[VisibleGpu], every: Sequence[VisibleGpu]
) -> VisibleGpu | None:
    """Return what one word of CUDA_VISIBLE_DEVICES means: a number, or the start of a UUID."""
    if word.isdigit():
        return numbered[int(word)] if int(word) < len(numbered) else None
    exact = [gpu for gpu in every if word in gpu.names]
    found = exact or [
        gpu for gpu in every if word and any(name.startswith(word) for name in gpu.names)
    ]
    if len(found) != 1:
        return None
    (gpu,) = found
    # A GPU in MIG mode is shown as its first slice.
    return gpu if gpu.is_slice else numbered[gpu.nvml_index]


def _words(gpu: VisibleGpu) -> str:
    what = "a slice of GPU" if gpu.is_slice else "GPU"
    return f"{what} {gpu.nvml_index} ({gpu.names[0]})"
