"""What the doctor finds of GPUs and their links, and what it asks NVML."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from autotune.cli import main
from autotune.doctor import Level
from autotune.doctor.gpus import Gpu, Pair, Process, check_gpus, check_links
from autotune.doctor.nvml import read_gpus
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
            "nvmlSystemGetDriverVersion": lambda: "580.65",
            "nvmlSystemGetProcessName": process_name,
        }
        for name, answer in answers.items():
            assert hasattr(pynvml, name), f"NVML has no {name}"
            monkeypatch.setattr(pynvml, name, answer)
        return pynvml


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


def test_gpus_are_numbered_as_cuda_does(monkeypatch):
    """And it is said which of nvidia-smi's numbers each is; those left out are not judged."""
    Nvml().install(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-0")
    gpus, pairs, _ = read_gpus()
    assert [(gpu.index, gpu.nvml_index) for gpu in gpus] == [(0, 2), (1, 0)]
    assert gpus[0].processes, "nvidia-smi's GPU 2 is the busy one"
    assert [(pair.first, pair.second, pair.path) for pair in pairs] == [(0, 1, "SYS")]
    numbers, first, *_ = check_gpus(gpus)[1:]
    assert numbers.check == "gpu_numbers"
    assert numbers.seen.endswith("in nvidia-smi GPU 0 is 2, GPU 1 is 0")
    assert first.seen.startswith("GPU 0: 99.00 GiB of 100.00 GiB free; held by a process (41)")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert "gpu_numbers" not in levels(check_gpus(read_gpus()[0]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert read_gpus()[:2] == ([], [])


def test_memory_that_is_the_host_s(monkeypatch):
    Nvml().install(monkeypatch)
    pynvml = pytest.importorskip("pynvml")

    def not_supported(handle):
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", not_supported)
    found = [each for each in check_gpus(read_gpus()[0]) if each.check == "gpu_memory"]
    assert [(each.level, each.seen) for each in found] == [
        (Level.OK, "GPU 0: shares the host's memory"),
        (Level.OK, "GPU 1: shares the host's memory"),
        (Level.WARNING, "GPU 2: shares the host's memory; held by a process (41)"),
    ]


def cut_gpu_1(monkeypatch):
    """Have the fake's GPU 1 in MIG mode, with seven slices."""
    pynvml = Nvml().install(monkeypatch)
    cut = {("slice", number): f"MIG-{letter}" for number, letter in enumerate("abcdefg")}
    whole_uuid, whole_name = pynvml.nvmlDeviceGetUUID, pynvml.nvmlDeviceGetName
    answers = {
        "nvmlDeviceGetMigMode": lambda handle: [int(handle == 1), 0],
        "nvmlDeviceGetMaxMigDeviceCount": lambda handle: 7 if handle == 1 else 0,
        "nvmlDeviceGetMigDeviceHandleByIndex": lambda handle, number: ("slice", number),
        "nvmlDeviceGetUUID": lambda handle: cut.get(handle) or whole_uuid(handle),
        "nvmlDeviceGetName": lambda handle: (
            whole_name(handle) + (" MIG 1g.18gb" if handle in cut else "")
        ),
    }
    for name, answer in answers.items():
        assert hasattr(pynvml, name), f"NVML has no {name}"
        monkeypatch.setattr(pynvml, name, answer)


def test_a_slice_of_a_gpu(monkeypatch):
    cut_gpu_1(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-b")
    (gpu,), pairs, _ = read_gpus()
    assert (gpu.index, gpu.nvml_index, gpu.mig, gpu.name) == (
        0, 1, True, "NVIDIA H200 MIG 1g.18gb",
    )  # fmt: skip
    assert pairs == [] and levels(check_gpus([gpu]))["gpu_mig"] is Level.WARNING


@pytest.mark.parametrize("what", ["slices", "the host's memory"])
def test_the_command_on_other_gpus_than_whole_ones(what, monkeypatch, capsys):
    if what == "slices":
        cut_gpu_1(monkeypatch)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-a,MIG-b")
    else:
        pynvml = Nvml().install(monkeypatch)

        def not_supported(handle):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", not_supported)
    asked = []
    monkeypatch.setattr(
        "autotune.doctor.all_checks.check_collectives", lambda ranks, *_: asked.append(ranks) or []
    )
    with pytest.raises(SystemExit):
        main(["doctor", "--json"])
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    found = json.loads(said.out)
    seen = [each["seen"] for each in found["findings"]]
    if what == "slices":
        assert found["gpus"] == ["NVIDIA H200 MIG 1g.18gb"] * 2 and asked == []
        assert "GPU 1 is in MIG mode" in seen
        assert "not tried: one rank has nobody to sum with" in seen
    else:
        assert "GPU 0: shares the host's memory" in seen and asked in ([3], [])


def test_the_command_says_that_the_variable_names_no_gpu(monkeypatch, capsys):
    Nvml().install(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-nonesuch")
    with pytest.raises(SystemExit) as caught:
        main(["doctor", "--no-collectives"])
    said = capsys.readouterr().err
    assert caught.value.code == 2 and "Traceback" not in said
    assert "CUDA_VISIBLE_DEVICES=GPU-nonesuch names no GPU of this machine" in said


def test_every_name_of_nvml_exists():
    pynvml = pytest.importorskip("pynvml")
    files = ("autotune/doctor/nvml.py", "autotune/spec/nvml.py")
    text = "".join((CHECKOUT / file).read_text() for file in files)
    names = set(re.findall(r"\bnvml\.((?:nvml|NVML)\w+)", text))
    assert len(names) > 20
    assert not [name for name in names if not hasattr(pynvml, name)]
