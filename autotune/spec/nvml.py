"""The GPUs that NVML sees and CUDA_VISIBLE_DEVICES lets through."""

from __future__ import annotations

import os

from autotune.errors import AutotuneError


def nvml_devices() -> tuple[list[str], list[int]]:
    """Return the names and total memory of the visible GPUs.

    Raises:
        AutotuneError: no GPU, or no way to look for one.
    """
    none_found = AutotuneError(
        "No NVIDIA GPU found. Predict without one with 'autotune plan --gpu-type TYPE' "
        "(h100-sxm, a100-80gb, rtx-4090 ...), or run on CPU processes with --device cpu."
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
        chosen = visible_indices(visible, uuids)
        names, memory = [names[index] for index in chosen], [memory[index] for index in chosen]
    if not names:
        raise none_found
    return names, memory


def nvml_driver() -> str:
    """Return the version of NVIDIA's driver; needs what `nvml_devices` needs."""
    import pynvml

    pynvml.nvmlInit()
    try:
        return str(pynvml.nvmlSystemGetDriverVersion())
    finally:
        pynvml.nvmlShutdown()


def visible_indices(visible: str, uuids: list[str]) -> list[int]:
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
