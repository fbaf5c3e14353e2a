import sys
import types

import pytest

from autotune.errors import AutotuneError
from autotune.spec.hardware import check_precision, detect_hardware, load_hardware
from autotune.spec.nvml import visible_gpus
from autotune.spec.workload import Precision
from autotune.units import GIB, MIB


def test_nodes_of_eight():
    hardware = load_hardware("h100-sxm", 24)
    assert (hardware.num_nodes, hardware.gpus_per_node) == (3, 8)
    with pytest.raises(AutotuneError, match=r"12 GPUs .* Nearest: 8 or 16"):
        load_hardware("h100-sxm", 12)


@pytest.mark.parametrize(("count", "share"), [(1, 1 / 8), (2, 1 / 4), (6, 3 / 4), (8, 1), (16, 1)])
def test_gpus_of_a_part_of_a_node_have_their_share_of_its_host(count, share):
    """The catalogue's l40s: 8 in a node with 1,536 GiB at 409 GB/s."""
    hardware = load_hardware("l40s", count)
    assert hardware.host_memory_bytes == int(1536 * GIB * share)
    assert hardware.host_bytes_per_s == pytest.approx(409e9 * share)


def test_memory_limit_lowers_and_never_raises():
    assert load_hardware("h100", 1, 10 * GIB).gpu.memory_bytes == 10 * GIB
    assert load_hardware("h100", 1, 500 * GIB).gpu.memory_bytes < 80 * GIB


def test_a_t4_has_no_bf16():
    gpu = load_hardware("t4", 1).gpu
    check_precision(gpu, Precision.FP32)
    with pytest.raises(AutotuneError, match=r"t4 has no bf16\. Use --precision fp32"):
        check_precision(gpu, Precision.BF16)


def test_cpu_ranks_share_the_machine():
    one, two = detect_hardware(1, "cpu"), detect_hardware(2, "cpu")
    assert one.gpu.is_cpu and two.num_gpus == 2
    assert two.gpu.memory_bytes == one.gpu.memory_bytes // 2
    assert two.gpu.peak_flops["fp32"] == one.gpu.peak_flops["fp32"] / 2
    assert detect_hardware(2, "cpu", 600 * MIB) == load_hardware("cpu", 2, 600 * MIB)


@pytest.mark.parametrize("count", [0, -1])
def test_no_gpus_asked_for(count):
    with pytest.raises(AutotuneError, match="at least 1"):
        load_hardware("h100", count)


def test_unknown_type():
    with pytest.raises(AutotuneError, match=r"'h1000'.*Nearest: h100.*Known: .*cpu"):
        load_hardware("h1000", 8)


class NvmlError(Exception):
    pass


class NotSupportedError(NvmlError):
    pass


def fake_nvml(names, memory=80 * GIB, broken=False, slices=()):
    """NVML of whole GPUs, of which those numbered in `slices` are cut in two (MIG).

    `memory` may be what asking for it raises.
    """

    def init():
        if broken:
            raise NvmlError("no driver")

    def memory_info(handle):
        if isinstance(memory, Exception):
            raise memory
        return types.SimpleNamespace(total=memory // 2 if isinstance(handle, tuple) else memory)

    def slice_of(handle, number):
        if number > 1:
            raise NvmlError("not found")
        return handle, number

    def name(handle):
        gpu, cut = handle if isinstance(handle, tuple) else (handle, None)
        return names[gpu] if cut is None else f"{names[gpu]} MIG 3g.40gb"

    def uuid(handle):
        gpu, cut = handle if isinstance(handle, tuple) else (handle, None)
        return f"GPU-{gpu}abc" if cut is None else f"MIG-{gpu}{cut}-uuid"

    return types.SimpleNamespace(
        NVMLError=NvmlError,
        nvmlInit=init,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: len(names),
        nvmlDeviceGetHandleByIndex=lambda index: index,
        NVMLError_NotSupported=NotSupportedError,
        nvmlDeviceGetName=name,
        nvmlDeviceGetMemoryInfo=memory_info,
        nvmlDeviceGetUUID=uuid,
        nvmlDeviceGetMigMode=lambda handle: [int(handle in slices), 0],
        nvmlDeviceGetMaxMigDeviceCount=lambda handle: 7,
        nvmlDeviceGetMigDeviceHandleByIndex=slice_of,
        nvmlDeviceGetGpuInstanceId=lambda handle: handle[1] + 1,
        nvmlDeviceGetComputeInstanceId=lambda handle: 0,
    )


H100 = "NVIDIA H100 80GB HBM3"


def test_detects_by_nvml(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml([H100] * 4, memory=70 * GIB))
    hardware = detect_hardware(2, "cuda")
    assert hardware.gpu.name == "h100-sxm" and hardware.num_gpus == 2
    assert hardware.gpu.memory_bytes == 70 * GIB
    # Two of its GPUs are used; the host is the machine's, all of it.
    assert hardware.host_memory_bytes == detect_hardware(1, "cpu").host_memory_bytes
    assert hardware.host_bytes_per_s == load_hardware("h100", 8).host_bytes_per_s


@pytest.mark.parametrize(
    ("nvml", "visible", "message"),
    [
        (fake_nvml([H100], broken=True), None, "autotune plan --gpu-type.*--device cpu"),
        (fake_nvml([]), None, "No NVIDIA GPU found"),
        (fake_nvml([H100] * 4), "", "No NVIDIA GPU found"),
        (fake_nvml([H100] * 2), None, "4 GPUs asked for, 2 found.*autotune plan --gpus 4"),
        (fake_nvml([H100] * 4), "0,2", "4 GPUs asked for, 2 found"),
        (fake_nvml([H100] * 4), "0,1,GPU-2,-1,3", "4 GPUs asked for, 3 found"),
        (fake_nvml([H100] * 4), "-1", "No NVIDIA GPU found"),
        (
            fake_nvml([H100] * 2, slices=[1]),
            "MIG-nonesuch",
            r"CUDA_VISIBLE_DEVICES=MIG-nonesuch names no GPU of this machine\. Here are GPU 0 "
            r"\(GPU-0abc\), GPU 1 \(GPU-1abc\), a slice of GPU 1 \(MIG-10-uuid\), ",
        ),
        (fake_nvml([H100] * 4), "7", "names no GPU of this machine"),
        (fake_nvml([H100] * 4, slices=range(4)), None, r"is a slice of a GPU \(MIG\), of which"),
        (fake_nvml([H100] * 4, memory=NvmlError("GPU is lost")), None, "does not answer: GPU is"),
    ],
)
def test_what_is_not_there(monkeypatch, nvml, visible, message):
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(AutotuneError, match=message):
        detect_hardware(4, "cuda")


def test_visible_devices_by_uuid(monkeypatch):
    nvml = fake_nvml([H100, "NVIDIA Toaster", H100])
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-2abc,GPU-0")
    assert detect_hardware(2, "cuda").gpu.name == "h100-sxm"


@pytest.mark.parametrize(
    ("visible", "first"),
    [
        ("MIG-11-uuid", "MIG-11-uuid"),
        ("MIG-11", "MIG-11-uuid"),
        ("MIG-GPU-1abc/2/0", "MIG-11-uuid"),
        ("MIG-10-uuid,MIG-11", "MIG-10-uuid"),
        ("1", "MIG-10-uuid"),
        ("GPU-1", "MIG-10-uuid"),
        (None, "MIG-00-uuid"),
    ],
)
def test_a_slice_of_a_gpu_has_its_own_memory(monkeypatch, visible, first):
    """Named by its UUID, by its old name, or the first one of its GPU."""
    nvml = fake_nvml([H100, H100], slices=[1] if visible else [0, 1])
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpu = detect_hardware(1, "cuda").gpu
    assert (gpu.name, gpu.memory_bytes) == (f"{H100} MIG 3g.40gb", 40 * GIB)
    assert visible_gpus(nvml)[0].names[0] == first


@pytest.mark.parametrize("names", [[H100], ["NVIDIA GB10"]])
def test_memory_shared_with_the_host(monkeypatch, names):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    nvml = fake_nvml(names, memory=NotSupportedError("Not Supported"))
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    host = detect_hardware(1, "cpu").host_memory_bytes
    gpu = detect_hardware(1, "cuda").gpu
    if names == [H100]:
        assert gpu.memory_bytes == min(host, load_hardware("h100", 1).gpu.memory_bytes)
    else:
        assert gpu.memory_bytes == host and "memory shared with the host" in gpu.source


def test_an_unknown_gpu_is_measured_all_the_same(monkeypatch, caplog):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(["NVIDIA Toaster"], memory=90 * GIB))
    gpu = detect_hardware(1, "cuda").gpu
    assert (gpu.name, gpu.memory_bytes) == ("NVIDIA Toaster", 90 * GIB)
    assert "stands in for it" in gpu.source and "Toaster" in caplog.text


def test_without_nvml(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(AutotuneError, match="nvidia-ml-py"):
        detect_hardware(1, "cuda")
