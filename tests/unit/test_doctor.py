"""The doctor's checks on machines made real: files in a folder, limits set, a tmpfs mounted."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from autotune.cli import main
from autotune.cli.doctor import print_findings
from autotune.doctor import Level, Machine
from autotune.doctor.collectives import Sum, collective_findings, rounds_of_pairs
from autotune.doctor.gpus import Gpu, Pair, Process, check_gpus, check_links, read_gpus
from autotune.doctor.host import (
    available_bytes,
    check_extension_locks,
    check_host_memory,
    check_shared_memory,
)
from autotune.doctor.network import check_infiniband, check_nccl, check_variables
from autotune.doctor.software import (
    LOWEST,
    check_accelerate_file,
    check_compiler,
    check_versions,
)
from autotune.units import GIB

CHECKOUT = Path(__file__).resolve().parents[2]
VERSIONS = {
    "torch": "2.13.0+cu130", "transformers": "5.24.0", "accelerate": "1.15.0",
    "deepspeed": "0.19.8", "ninja": "1.13",
}  # fmt: skip


@pytest.fixture
def machine(tmp_path):
    """Return what makes a machine of files; `variables` are the environment."""

    def make(files=None, **variables):
        for name, text in (files or {}).items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return Machine(root=tmp_path, home=tmp_path / "home", variables=variables)

    return make


def levels(findings):
    return {finding.check: finding.level for finding in findings}


def worst(findings):
    return max(findings, key=lambda finding: list(Level).index(finding.level))


def in_a_limited_process(code: str, *before: str) -> list[dict[str, str]]:
    """Run checks where a limit really holds; `before` is a command that sets it."""
    words = f"import json, sys\n{code}\nprint(json.dumps([f.to_dict() for f in found]))"
    done = subprocess.run(
        [*before, sys.executable, "-c", words],
        capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_limits_are_those_that_hold():
    code = (
        "import resource\nfrom autotune.doctor.host import check_limits\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))\n"
        "resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (2**33, 2**33))\n"
        "found = [*check_limits(infiniband=False), *check_limits(infiniband=True)]"
    )
    found = in_a_limited_process(code)
    seen = [(f["check"], f["level"]) for f in found]
    assert seen == [
        ("nofile", "warning"), ("memlock", "note"), ("data", "warning"),
        ("nofile", "warning"), ("memlock", "broken"), ("data", "warning"),
    ]  # fmt: skip
    assert "256 open files" in found[0]["seen"] and "0.1 MiB" in found[1]["seen"]
    assert all(f["do"] for f in found)


def test_shared_memory_as_small_as_docker_s(tmp_path):
    shm = tmp_path / "dev/shm"
    shm.mkdir(parents=True)
    if subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "x", shm]).returncode:
        pytest.skip("no right to mount a tmpfs here")
    script = tmp_path / "mounted.sh"
    script.write_text(f'mount -t tmpfs -o size=$1 x {shm} && shift && exec "$@"\n')
    code = (
        "from pathlib import Path\nfrom autotune.doctor import Machine\n"
        "from autotune.doctor.host import check_shared_memory\n"
        f"found = check_shared_memory(Machine(root=Path({str(tmp_path)!r})), ranks=2)"
    )
    for size, level in (("64m", "broken"), ("512m", "warning"), ("2g", "ok")):
        before = ("unshare", "-m", "sh", str(script), size)
        (found,) = in_a_limited_process(code, *before)
        assert found["level"] == level, found
        assert ("--ipc=host" in found["do"]) is (level != "ok")


def test_no_shared_memory_at_all(machine):
    (found,) = check_shared_memory(machine(), ranks=2)
    assert found.level is Level.WARNING and "no /dev/shm" in found.seen


def test_host_memory_is_the_container_s_where_that_is_less(machine):
    files = {"proc/meminfo": f"MemTotal: {64 * 2**20} kB\nMemAvailable: {32 * 2**20} kB\n"}
    assert available_bytes(machine(files)) == 32 * GIB
    files |= {"sys/fs/cgroup/memory.max": str(16 * GIB), "sys/fs/cgroup/memory.current": str(GIB)}
    assert available_bytes(machine(files)) == 15 * GIB
    here = machine(files)
    stat = (
        f"anon {GIB}\nfile {14 * GIB}\nshmem {2 * GIB}\ninactive_file {11 * GIB}\nactive_file {GIB}"
    )
    read = {"sys/fs/cgroup/memory.current": str(15 * GIB), "sys/fs/cgroup/memory.stat": stat}
    assert available_bytes(machine(files | read)) == 13 * GIB, "files once read are given back"

    def level(parameters, ranks=2):
        (found,) = check_host_memory(here, num_parameters=parameters, model="m", ranks=ranks)
        return found.level

    assert level(None) is Level.OK and level(None, ranks=16) is Level.BROKEN
    assert [level(n * 10**9) for n in (0.5, 1, 8)] == [Level.OK, Level.WARNING, Level.BROKEN]
    assert available_bytes(machine({"sys/fs/cgroup/memory.max": "max"})) == 32 * GIB


def test_a_lock_that_a_killed_build_left(machine):
    assert check_extension_locks(machine())[0].level is Level.OK
    left = "home/.cache/torch_extensions/py311_cpu/cpu_adam/lock"
    (found,) = check_extension_locks(machine({left: ""}))
    assert found.level is Level.WARNING and "cpu_adam/lock" in found.seen
    (elsewhere,) = check_extension_locks(
        machine({"built/x/lock": ""}, TORCH_EXTENSIONS_DIR="built")
    )
    assert elsewhere.level is Level.WARNING and "built/x/lock" in elsewhere.seen


def test_infiniband_ports(machine):
    assert check_infiniband(machine(), nodes=1)[0].level is Level.OK
    alone = check_infiniband(machine(), nodes=2)[0]
    assert alone.level is Level.WARNING and "NCCL_SOCKET_IFNAME" in alone.do
    port = "sys/class/infiniband/mlx5_{}/ports/1/{}"
    files = {
        port.format(0, "state"): "4: ACTIVE\n", port.format(0, "rate"): "400 Gb/sec (4X NDR)\n",
        port.format(0, "link_layer"): "InfiniBand\n", port.format(1, "state"): "1: DOWN\n",
    }  # fmt: skip
    up, down = check_infiniband(machine(files), nodes=2)
    assert up.level is Level.OK and "400 Gb/sec" in up.seen
    assert down.level is Level.WARNING and "NCCL_IB_HCA=^mlx5_1" in down.do


def test_variables_that_slow_or_mislead(machine):
    net = {"sys/class/net/lo/x": "", "sys/class/net/eth0/x": ""}
    assert levels(check_variables(machine(net), infiniband=True)) == {"nccl_env": Level.OK}
    for name in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE", "CUDA_LAUNCH_BLOCKING"):
        (found,) = check_variables(machine(net, **{name: "1"}), infiniband=True)
        assert found.level is Level.WARNING and f"unset {name}" in found.do
        assert worst(check_variables(machine(net, **{name: "0"}), infiniband=True)).level in (
            Level.OK, Level.NOTE,
        )  # fmt: skip
    assert worst(check_variables(machine(net, NCCL_IB_DISABLE="1"), infiniband=False)).level in (
        Level.OK, Level.NOTE,
    )  # fmt: skip
    (found,) = check_variables(machine(net, ACCELERATE_USE_FSDP="true"), infiniband=False)
    assert found.level is Level.WARNING and "ACCELERATE_USE_FSDP" in found.seen
    (found,) = check_variables(machine(net, RANK="0", WORLD_SIZE="8"), infiniband=False)
    assert found.level is Level.NOTE and "RANK, WORLD_SIZE" in found.seen


@pytest.mark.parametrize(
    ("name", "value", "chosen"),
    [
        ("NCCL_SOCKET_IFNAME", "eth", "eth0"),
        ("NCCL_SOCKET_IFNAME", "=eth", None),
        ("NCCL_SOCKET_IFNAME", "=eth0", "eth0"),
        ("NCCL_SOCKET_IFNAME", "^lo,docker", "eth0"),
        ("NCCL_SOCKET_IFNAME", "ib0", None),
        ("GLOO_SOCKET_IFNAME", "eth", None),
        ("GLOO_SOCKET_IFNAME", "lo", "lo"),
    ],
)
def test_interfaces_as_the_libraries_read_them(machine, name, value, chosen):
    net = {"sys/class/net/lo/x": "", "sys/class/net/eth0/x": ""}
    (found,) = check_variables(machine(net, **{name: value}), infiniband=False)
    assert found.level is (Level.BROKEN if chosen is None else Level.NOTE)
    if chosen:
        assert found.seen.endswith(f"chooses {chosen}")
    else:
        assert "one of eth0, lo" in found.do


def test_nccl_packages():
    assert check_nccl({}, gpus=0)[0].level is Level.OK
    assert check_nccl({"nvidia-nccl-cu13": "2.28"}, gpus=8)[0].level is Level.OK
    two = check_nccl({"nvidia-nccl-cu12": "2.27", "nvidia-nccl-cu13": "2.28"}, gpus=8)[0]
    assert two.level is Level.WARNING and "cu12 2.27" in two.seen


def test_versions():
    assert levels(check_versions(VERSIONS, gpus=8, driver_cuda=(13, 0)))["versions"] is Level.OK
    for name in LOWEST:
        (old,) = check_versions(VERSIONS | {name: "0.1+cu130"}, gpus=8, driver_cuda=(13, 0))
        assert old.level is Level.WARNING and f"{name} 0.1" in old.seen
    cpu = VERSIONS | {"torch": "2.13.0+cpu"}
    assert levels(check_versions(cpu, gpus=0)) == {"versions": Level.OK}
    assert levels(check_versions(cpu, gpus=1))["torch"] is Level.BROKEN
    old_driver = worst(check_versions(VERSIONS, gpus=1, driver_cuda=(12, 8)))
    assert old_driver.level is Level.BROKEN and "CUDA 13" in old_driver.seen
    both = VERSIONS | {"pynvml": "13.0", "nvidia-ml-py": "13.6"}
    assert worst(check_versions(both, gpus=1, driver_cuda=(13, 0))).level is Level.WARNING
    (missing,) = (f for f in check_versions({}, gpus=0) if f.check == "versions")
    assert missing.level is Level.NOTE and "autotune-llm[train]" in missing.do


def test_a_compiler_is_looked_for_where_deepspeed_is(tmp_path):
    assert check_compiler({}) == []
    assert check_compiler(VERSIONS, lambda name: f"/bin/{name}")[0].level is Level.OK
    bare = VERSIONS.copy()
    del bare["ninja"]
    (found,) = check_compiler(bare, lambda name: None)
    assert found.level is Level.BROKEN and "C++ compiler and ninja" in found.seen


def test_accelerate_s_default_file(machine):
    assert check_accelerate_file(machine(), gpus=8)[0].level is Level.OK
    text = "compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\nnum_processes: 4\n"
    file = "home/.cache/huggingface/accelerate/default_config.yaml"
    (stale,) = check_accelerate_file(machine({file: text}), gpus=8)
    assert stale.level is Level.WARNING and "FSDP on 4 processes" in stale.seen
    assert check_accelerate_file(machine(), gpus=4)[0].level is Level.NOTE
    elsewhere = machine({"hf/accelerate/default_config.json": '{"num_processes": 4}'}, HF_HOME="hf")
    assert "hf/accelerate" in check_accelerate_file(elsewhere, gpus=8)[0].seen


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


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8])
def test_every_pair_once_in_rounds_of_disjoint_ones(count):
    rounds = list(rounds_of_pairs(count))
    pairs = [pair for each in rounds for pair in each]
    assert sorted(pairs) == [(a, b) for a in range(count) for b in range(a + 1, count)]
    assert all(len({rank for pair in each for rank in pair}) == 2 * len(each) for each in rounds)


def test_sums_in_words():
    good = [Sum(ranks=(0, 1), seconds=0.001), Sum(ranks=(0, 2), seconds=0.001)]
    slow = Sum(ranks=(1, 2), seconds=0.1)
    whole = Sum(ranks=(0, 1, 2), seconds=0.002)
    fine = collective_findings([*good, slow, whole], "cuda", 30)
    assert [f.level for f in fine] == [Level.OK, Level.WARNING] and "pair 1-2" in fine[1].seen
    assert [f.level for f in collective_findings([*good, slow, whole], "cpu", 30)] == [Level.OK]
    hung = Sum(ranks=(1, 2), hung=True, silent=(2,))
    (found,) = collective_findings([*good, hung, whole], "cuda", 30)
    assert found.level is Level.BROKEN
    assert "NCCL hung: pair 1-2, no answer of rank 2 within 30 s" in found.seen
    assert "NCCL_P2P_DISABLE=1" in found.do and "NCCL_IB_DISABLE=1" in found.do
    (found,) = collective_findings([Sum(ranks=(0, 1, 2), error="x: y")], "cpu", 30)
    assert "gloo failed: all 3 ranks: x: y" in found.seen


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_text_keeps_to_the_width(width, machine):
    findings = check_variables(machine(NCCL_SOCKET_IFNAME="ib0", RANK="1"), infiniband=False)
    out = io.StringIO()
    print_findings(findings, Console(file=out, width=width))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert lines[-1] == "1 broken, 1 note."
    text = " ".join(out.getvalue().split())
    for finding in findings:
        for words in (finding.check, finding.seen, finding.do):
            assert words in text


def test_the_command_says_it_in_json_and_by_its_exit_code(capsys, monkeypatch):
    def doctor(*words):
        with pytest.raises(SystemExit) as caught:
            main(["doctor", "--device", "cpu", "--no-collectives", "--json", *words])
        return caught.value.code, json.loads(capsys.readouterr().out)["findings"]

    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    code, found = doctor()
    assert code == int(any(each["level"] == "broken" for each in found))
    assert {"shm", "nofile", "host_memory", "versions", "infiniband"} <= {f["check"] for f in found}
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nonesuch0")
    code, found = doctor()
    assert code == 1
    assert any(f["check"] == "interfaces" and "nonesuch0" in f["seen"] for f in found)


@pytest.mark.parametrize(
    "words", [["--timeout", "soon"], ["--nodes", "0"], ["--model", "nonesuch"]]
)
def test_bad_input(words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["doctor", "--device", "cpu", "--no-collectives", *words])
    assert caught.value.code == 2 and "Traceback" not in capsys.readouterr().err


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
