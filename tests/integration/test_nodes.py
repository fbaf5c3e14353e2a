"""A search over two hosts, which are network namespaces: 1 + 1 ranks, and a host that dies."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from autotune.trial.nodes.wire import SECRET_VARIABLE
from autotune.trial.processes import tagged_processes

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]
LIMIT_S = 300


def _netns() -> ModuleType:
    spec = importlib.util.spec_from_file_location("netns", ROOT / "benchmarks/search/netns.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["netns"] = module
    spec.loader.exec_module(module)
    return module


netns = _netns()


@pytest.mark.skipif(netns.why_not() is not None, reason=str(netns.why_not()))
@pytest.mark.slow
def test_a_host_that_dies_ends_the_trial_and_not_the_search(tmp_path: Path) -> None:
    """The first launch loses its second host; that one comes back, and the second launch ends."""
    study = tmp_path / "study"
    command = [
        *(sys.executable, "-m", "autotune", "search", "--model", "tiny-qwen3", "--device", "cpu"),
        *("--gpus", "2", "--nodes", "2", "--rdzv-endpoint", "10.77.0.1:29400"),
        *("--seq-len", "64", "--global-batch-size", "4", "--strategies", "ddp"),
        *("--sequence-parallel", "1", "--recompute", "none,full", "--micro-batches", "2"),
    ]
    mark = ("AUTOTUNE_TEST_HOST", str(tmp_path))
    secret = {SECRET_VARIABLE: "of this test", mark[0]: mark[1], "AUTOTUNE_KNOWLEDGE": "off"}

    def start(hosts: netns.Hosts, host: int) -> subprocess.Popen[bytes]:  # type: ignore[name-defined]
        log = (tmp_path / f"host{host}.log").open("ab")
        with log:
            process: subprocess.Popen[bytes] = hosts.popen(
                host,
                [*command, "--out", str(study if host == 0 else tmp_path / "unused")],
                env={**secret, "PYTHONPATH": str(ROOT)},
                stdout=log,
                stderr=log,
                cwd=tmp_path,
            )
        return process

    running: list[subprocess.Popen[bytes]] = []
    with netns.Hosts() as hosts:
        try:
            running = [start(hosts, 0), start(hosts, 1)]
            _wait_for(lambda: bool(list(study.glob("launches/0001*/rank-1.log"))), running)
            running[1].kill()
            running[1].wait()
            running[1] = start(hosts, 1)
            codes = [process.wait(LIMIT_S) for process in running]
        finally:
            for process in running:
                process.kill()
                process.wait()
    said = [(tmp_path / f"host{host}.log").read_text() for host in (0, 1)]
    assert codes == [0, 0], said
    records = [json.loads(line) for line in (study / "trials.jsonl").read_text().splitlines()]
    lost = [record for record in records if record["outcome"] == "crashed"]
    measured = [record for record in records if record["outcome"] == "ok"]
    assert len(lost) == 1 and "lost with its host" in lost[0]["message"], records
    assert {record["launch"] for record in measured} >= {2}
    assert not (tmp_path / "unused").exists()
    assert "is lost" in said[0] and "led by 10.77.0.1:29400" in said[1]
    launch = next(study.glob("launches/0002*"))
    assert (launch / "rank-1.log").exists() and (launch / "rank-1.result.json").exists()
    assert json.loads((study / "study.json").read_text())["hardware"]["fingerprint"].startswith(
        "2 x cpu on 2 nodes"
    )
    assert not tagged_processes(*mark), "something was left running"


def _wait_for(holds: Callable[[], bool], running: list[subprocess.Popen[bytes]]) -> None:
    ends = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < ends
        assert all(process.poll() is None for process in running)
        time.sleep(0.05)


def test_the_network_namespaces_need_root(tmp_path: Path) -> None:
    if os.geteuid() == 0 and netns.why_not() is None:
        pytest.skip("this is root")
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/search/netns.py"), "--measure"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 2 and "root" in done.stderr
