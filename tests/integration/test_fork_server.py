"""Forked ranks do what cold ones do, die as they should, and are found as they are."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from autotune.spec.workload import Workload
from autotune.trial.conversation import ConversationalLaunch
from autotune.trial.forkserver import ForkServer
from autotune.trial.launch import Running
from autotune.trial.outcome import read_rungs
from autotune.trial.processes import process_state
from autotune.trial.protocol import Measurement, Outcome, RankResult, Request, Rung
from tests.integration.commands import assert_nothing_left, rank_pids, wait_until
from tests.integration.ranks import (
    LIMITS,
    forking_starter,
    logged,
    make_plan,
    run,
    training_request,
    trial_request,
)

pytestmark = pytest.mark.integration

MIB = 2**20


@pytest.fixture
def server() -> ForkServer:
    """The server of all tests: one that a test killed starts again at the next launch."""
    found = forking_starter()
    assert found is not None
    return found


def peaks(results: list[RankResult]) -> list[int]:
    return [
        part.peak_allocated_bytes
        for result in results
        for rung in result.rungs
        for part in rung.accumulations
    ]


@pytest.mark.slow
def test_both_starts_measure_the_same_memory(server: ForkServer, tmp_path: Path) -> None:
    """Two cold starts differ by 0.5 MiB; without the file pages a forked rank showed 12 more.

    The ladder's tokens, and what the checks saw, are the same.
    """
    seen = {}
    for start, starter in (("cold", None), ("fork", server)):
        request = trial_request(
            make_plan("fsdp2", 2), tmp_path / start, rungs=[(2, 2), (4, 2)], seed=1
        )
        ended = run(request, starter=starter)
        assert ended.outcome is Outcome.OK, ended.message
        assert ended.notes == []
        assert [result.start for result in ended.results] == [start] * 2
        assert all(result.imports_s and result.ready_s for result in ended.results)
        assert all(r.ready_s > r.imports_s for r in ended.results if r.ready_s and r.imports_s)
        seen[start] = ended.results
        (record, _) = read_rungs(request, ended.results, ended.outcome, ended.message)
        assert record.launch_mode == start and record.launch_ready_s
        assert_nothing_left(tmp_path / start)
    for cold, forked in zip(peaks(seen["cold"]), peaks(seen["fork"]), strict=True):
        assert forked == pytest.approx(cold, abs=2 * MIB)
    for cold, forked in zip(seen["cold"], seen["fork"], strict=True):
        assert forked.asserted == cold.asserted and forked.versions == cold.versions
        assert forked.baseline_bytes == pytest.approx(cold.baseline_bytes, abs=32 * MIB)


@pytest.mark.slow
def test_both_starts_train_alike(
    server: ForkServer, corpus: Path, initial_state: Path, tmp_path: Path
) -> None:
    losses = {}
    for start, starter in (("cold", None), ("fork", server)):
        request = training_request(
            make_plan("zero2", 2, micro_batch_size=2),
            tmp_path / start,
            data=corpus,
            weights=initial_state,
            workload=Workload(seq_len=64, global_batch_size=4, precision="fp32"),
            max_steps=4,
            logging_steps=1,
            learning_rate=1e-3,
        )
        ended = run(request, starter=starter)
        assert ended.outcome is Outcome.OK, ended.message
        losses[start] = logged(request.out_dir, "loss")
    assert len(losses["cold"]) == 4
    assert losses["fork"] == pytest.approx(losses["cold"], rel=1e-6)


def test_the_memory_limit_holds_as_it_does_cold(server: ForkServer, tmp_path: Path) -> None:
    request = trial_request(
        make_plan("ddp", 2), tmp_path, rungs=[(1, 2), (4096, 2)], memory_limit_bytes=200 * MIB
    )
    ended = run(request, starter=server)
    assert ended.outcome is Outcome.OOM, ended.message
    assert [r.outcome for r in read_rungs(request, ended.results, ended.outcome, "")] == [
        Outcome.OK,
        Outcome.OOM,
    ]


@pytest.mark.slow
def test_the_imports_read_nothing_that_a_launch_changes(tmp_path: Path) -> None:
    script = (
        "import os, sys\n"
        "from autotune.trial.forkserver import PER_LAUNCH\n"
        "kind = type(os.environ)\n"
        "read, names = kind.__getitem__, set()\n"
        "kind.__getitem__ = lambda self, name: names.add(name) or read(self, name)\n"
        "from autotune.runner.imports import import_everything\n"
        "import_everything()\n"
        "assert 'DS_ACCELERATOR' in names\n"
        "print(sorted(names & PER_LAUNCH))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""},
    )
    # CUDA_VISIBLE_DEVICES is read again whenever devices are counted.
    assert done.stdout.split("\n")[-2] == "['CUDA_VISIBLE_DEVICES']", done.stderr[-2000:]


def waiting(folder: Path, **changes: Any) -> Request:
    measurement = Measurement(min_steps=2, max_steps=3, target_seconds=0.2)
    return trial_request(
        make_plan("ddp", 2), folder, rungs=[], measurement=measurement, converses=True, **changes
    )


def test_the_processor_is_asked_about_once_and_only_for_cpu_adam(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cpuinfo

    from autotune.runner.cpu_info import ask_cpu_once
    from autotune.runner.server import _loads_cpu_adam

    asked = []
    monkeypatch.setattr(cpuinfo, "get_cpu_info", lambda: asked.append(1) or {"arch": "X86_64"})
    ask_cpu_once.cache_clear()
    for _ in range(2):
        ask_cpu_once()
        assert cpuinfo.get_cpu_info() == {"arch": "X86_64"}
    assert len(asked) == 1
    for strategy, loads in {
        "zero2_offload_optimizer": True, "fsdp2_offload": False, "zero2": False, "ddp": False
    }.items():  # fmt: skip
        request = trial_request(make_plan(strategy, 2), tmp_path, rungs=[(1, 1)])
        (tmp_path / "request.json").write_text(request.model_dump_json())
        assert _loads_cpu_adam(str(tmp_path / "request.json")) is loads


def test_a_launch_measures_what_it_is_asked(server: ForkServer, tmp_path: Path) -> None:
    with ConversationalLaunch(waiting(tmp_path), tmp_path, LIMITS, starter=server) as launch:
        first = launch.measure(Rung(micro_batch_size=1, grad_accum_steps=4))
        assert first.outcome is Outcome.OK, first.message
        assert first.measured_accum_steps == (4,) and not first.cut_short
        assert first.rung_wall_s and len(first.warmup_times_s) >= 1
        second = launch.measure(Rung(micro_batch_size=2, grad_accum_steps=2), give_up_step_s=1e-6)
        assert second.outcome is Outcome.OK and second.step_times_s
        assert launch.alive
        ended = launch.close()
    assert ended.outcome is Outcome.OK and ended.exit_codes == [0, 0], ended.message
    assert launch.close() == ended and not launch.alive
    with pytest.raises(RuntimeError, match="over"):
        launch.measure(Rung(micro_batch_size=4, grad_accum_steps=1))
    assert_nothing_left(tmp_path)


def test_a_supervisor_that_says_nothing_is_not_waited_for(
    server: ForkServer, tmp_path: Path
) -> None:
    running = Running(waiting(tmp_path, idle_limit_s=1.0), tmp_path, starter=server)
    try:
        running.start()
        assert not running.watch(hang_s=60, deadline=(time.monotonic() + 120, "the test's end"))
    finally:
        running.stop()
    ended = running.end()
    assert ended.outcome is Outcome.CRASHED
    assert "the supervisor asked for nothing in 1 s: no order 1" in ended.message


@pytest.mark.slow
def test_a_forked_rank_multiplies_on_several_threads(tmp_path: Path) -> None:
    """An OpenMP pool of the server's would hang it for ever."""
    script = (
        "import os, sys, torch\n"
        "from autotune.runner.imports import import_everything\n"
        "import_everything()\n"
        "pid = os.fork()\n"
        "if not pid:\n"
        "    torch.set_num_threads(4)\n"
        "    a = torch.ones(512, 512)\n"
        "    os._exit(0 if float((a @ a).sum()) == 512.0**3 and a.exp().sum() > 0 else 3)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "2"}
    assert (
        subprocess.run([sys.executable, "-c", script], env=environment, timeout=120).returncode == 0
    )


@pytest.mark.slow
def test_a_server_that_dies_is_started_again_and_the_launch_repeated(
    server: ForkServer, tmp_path: Path
) -> None:
    before = server.pid
    assert before is not None
    killed = []

    def kill_server() -> None:
        if not killed and len(rank_pids(tmp_path)) == 2:
            killed.append(before)
            os.kill(before, signal.SIGKILL)

    request = trial_request(make_plan("ddp", 2), tmp_path, rungs=[(1, 2)])
    ended = run(request, starter=server, on_tick=kill_server)
    assert killed and ended.outcome is Outcome.OK, ended.message
    assert ended.notes == ["the fork server died with -9; the launch is repeated"]
    assert server.pid not in (None, before)
    assert [result.start for result in ended.results] == ["fork"] * 2
    assert_nothing_left(tmp_path)


@pytest.mark.slow
def test_a_server_with_a_cuda_context_refuses_and_ranks_start_cold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library that does nothing, mapped under the names by which a context is seen."""
    maps = Path("/proc/self/maps").read_text().split()
    libraries = Path(next(word for word in maps if "libc.so" in word)).parent
    for name in ("libcuda.so.1", "nvidia-uvm"):
        shutil.copy(libraries / "libdl.so.2", tmp_path / name)
    preload = f"{tmp_path / 'libcuda.so.1'}:{tmp_path / 'nvidia-uvm'}"
    monkeypatch.setenv("LD_PRELOAD", preload)
    request = trial_request(make_plan("ddp", 2), tmp_path / "launch", rungs=[(1, 2)])
    with ForkServer(tmp_path / "server") as own:
        ended = run(request, starter=own)
        assert own.pid is None, "of no more use"
    assert ended.outcome is Outcome.OK, ended.message
    assert [result.start for result in ended.results] == ["cold"] * 2
    (note,) = ended.notes
    assert "holds a CUDA context" in note and note.endswith("ranks start cold")


@pytest.mark.slow
def test_server_and_ranks_die_with_the_supervisor(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path\n"
        "from autotune.trial.forkserver import ForkServer\n"
        "from autotune.trial.launch import Running\n"
        "from autotune.trial.protocol import Request, read_message\n"
        "folder = Path(sys.argv[1])\n"
        "server = ForkServer(folder)\n"
        "Running(read_message(Request, folder / 'asked.json'), folder, starter=server).start()\n"
        "print(server.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    (tmp_path / "asked.json").write_text(waiting(tmp_path).model_dump_json())
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE
    ) as supervisor:
        assert supervisor.stdout is not None
        pid = int(supervisor.stdout.readline())
        wait_until(lambda: len(rank_pids(tmp_path)) == 2, "two ranks", 60)
        supervisor.kill()
    # Z where nobody collects orphans, as in a container without an init.
    wait_until(lambda: process_state(pid) in (None, "Z"), "the server's end", 10)
    assert_nothing_left(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero3"])
def test_a_confirmation_evaluates_and_saves(
    strategy: str, server: ForkServer, tmp_path: Path
) -> None:
    plan = make_plan(strategy, 2, micro_batch_size=2, grad_accum_steps=6)
    request = trial_request(plan, tmp_path, rungs=[(2, 6)], rehearses=True)
    ended = run(request, starter=server)
    assert ended.outcome is Outcome.OK, ended.message
    for result in ended.results:
        assert result.rehearsal is not None
        # The weights and Adam's two moments are 4 bytes each at least, over all ranks.
        assert result.rehearsal.checkpoint_bytes > 12 * 64 * 512
    (record,) = read_rungs(request, ended.results, ended.outcome, ended.message)
    assert record.measured_accum_steps == (6,) and record.evaluation_s and record.save_s
    assert record.step_tokens_read == 2 * 2 * 6 * 63, "every row is filled"
    assert record.step_tokens is not None and record.step_tokens < record.step_tokens_read
    assert not list(tmp_path.glob("checkpoint-*"))
