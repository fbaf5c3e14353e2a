"""What the doctor finds of GPUs and their links, and what it asks NVML."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from autotune.doctor import Level
from autotune.doctor.gpus import Gpu, Pair, Process, check_gpus, check_links, read_gpus
from autotune.units import GIB
from tests.unit.doctor_levels import levels

CHECKOUT = Path(__file__).resolve().parents[2]


def test_gpus_and_who_holds_them():
    free = Gpu(index=0, name="NVIDIA H200", total_bytes=141 * GIB, free_bytes=140 * GIB)
    held = Gpu(
        index=1, name="NVIDIA H200", total_bytes=141 * GIB, free_bytes=100 * GIB, nvlinks=18,
        processes=(Process(pid=7, name="python", used_bytes=41 * GIB),),
    )  # fmt: skip
    kinds, first, second = check_gpus([free, held])
    assert (kinds.level, first.level, second.level) == (Level.OK, Level.OK, Level.WARNING)
    assert "held by python (7, 41.00 GiB)" in second.seen
    unseen = Gpu(index=0, name="NVIDIA H200", total_bytes=100 * GIB, free_bytes=50 * GIB)
    assert "50.00 GiB held by processes not seen here" in check_gpus([unseen])[1].seen
    other = Gpu(
        index=1, name="NVIDIA L4", total_bytes=24 * GIB, free_bytes=24 * GIB,
        mig=True, uncorrected_errors=3,
    )  # fmt: skip
    assert levels(check_gpus([free, other])) == {
        "gpus": Level.WARNING, "gpu_memory": Level.OK, "gpu_errors": Level.BROKEN,
        "gpu_mig": Level.WARNING,
    }  # fmt: skip


def test_links_and_peer_access():
    def pair(first, second, path="NVLink", access=True):
        return Pair(first=first, second=second, path=path, peer_access=access)

    assert check_links([]) == []
    every = [pair(0, 1), pair(0, 2), pair(1, 2)]
    assert levels(check_links(every)) == {"links": Level.OK, "peer_access": Level.OK}
    mixed = check_links([pair(0, 1), pair(0, 2, "SYS", False), pair(1, 2, "SYS", False)])
    assert levels(mixed) == {"links": Level.NOTE, "peer_access": Level.WARNING}
    assert "GPUs 0-2, 1-2" in mixed[1].seen and "NCCL_P2P_DISABLE=1" in mixed[1].do
    assert levels(check_links([pair(0, 1, "PHB", None)])) == {"links": Level.NOTE}


class Nvml:
    """A node of three GPUs: 0 and 1 behind one NVLink switch, 2 across the CPUs, and busy."""

    def install(self, monkeypatch):
        pynvml = pytest.importorskip("pynvml")

        unsupported = pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        there = SimpleNamespace

        def link_state(handle, link):
            if handle == 2:
                raise unsupported
            return int(link < 2)

        def process_name(pid):
            raise unsupported

        answers = {
            "nvmlInit": lambda: None,
            "nvmlShutdown": lambda: None,
            "nvmlDeviceGetCount": lambda: 3,
            "nvmlDeviceGetHandleByIndex": lambda index: index,
            "nvmlDeviceGetName": lambda handle: "NVIDIA H200",
            "nvmlDeviceGetUUID": lambda handle: f"GPU-{handle}",
            "nvmlDeviceGetMemoryInfo": lambda handle: there(total=100 * GIB, free=99 * GIB),
            "nvmlDeviceGetComputeRunningProcesses": lambda handle: (
                [there(pid=41, usedGpuMemory=None)] if handle == 2 else []
            ),
            "nvmlDeviceGetTotalEccErrors": lambda handle, kind, counter: int(handle == 1),
            "nvmlDeviceGetMigMode": lambda handle: [0, 0],
            "nvmlDeviceGetPciInfo": lambda handle: there(busId=f"0000:0{handle}:00.0"),
            "nvmlDeviceGetNvLinkState": link_state,
            "nvmlDeviceGetNvLinkRemotePciInfo": lambda handle, link: there(
                busId=f"0000:a{link}:00.0"
            ),
            "nvmlDeviceGetTopologyCommonAncestor": lambda one, two: pynvml.NVML_TOPOLOGY_SYSTEM,
            "nvmlDeviceGetP2PStatus": lambda one, two, kind: (
                pynvml.NVML_P2P_STATUS_OK
                if 2 not in (one, two)
                else pynvml.NVML_P2P_STATUS_NOT_SUPPORTED
            ),
            "nvmlSystemGetCudaDriverVersion_v2": lambda: 13010,
            "nvmlSystemGetProcessName": process_name,
        }
        for name, answer in answers.items():
            assert hasattr(pynvml, name), f"NVML has no {name}"
            monkeypatch.setattr(pynvml, name, answer)


def test_what_nvml_says_is_read(monkeypatch):
    Nvml().install(monkeypatch)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    gpus, pairs, driver = read_gpus()
    assert driver == (13, 1)
    assert [(gpu.nvlinks, gpu.uncorrected_errors, gpu.mig) for gpu in gpus] == [
        (2, 0, False), (2, 1, False), (0, 0, False),
    ]  # fmt: skip
    assert gpus[2].processes == (Process(pid=41, name="a process", used_bytes=None),)
    assert [(p.first, p.second, p.path, p.peer_access) for p in pairs] == [
        (0, 1, "NVLink", True), (0, 2, "SYS", False), (1, 2, "SYS", False),
    ]  # fmt: skip
    assert levels(check_links(pairs)) == {"links": Level.NOTE, "peer_access": Level.WARNING}


def test_gpus_that_are_left_out_are_not_judged(monkeypatch):
    Nvml().install(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,GPU-0")
    gpus, pairs, _ = read_gpus()
    assert [gpu.index for gpu in gpus] == [0, 1]
    assert [(pair.first, pair.second) for pair in pairs] == [(0, 1)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert read_gpus()[:2] == ([], [])


def test_every_name_of_nvml_exists():
    pynvml = pytest.importorskip("pynvml")
    text = (CHECKOUT / "autotune/doctor/gpus.py").read_text()
    names = set(re.findall(r"\bnvml\.((?:nvml|NVML)\w+)", text))
    assert len(names) > 15
    assert not [name for name in names if not hasattr(pynvml, name)]
