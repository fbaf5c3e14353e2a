"""What the doctor finds of limits, shared memory, host memory and locks; each made real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from autotune.doctor import Level
from autotune.doctor.host import (
    available_bytes,
    check_extension_locks,
    check_host_memory,
    check_shared_memory,
)
from autotune.units import GIB

CHECKOUT = Path(__file__).resolve().parents[2]


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
