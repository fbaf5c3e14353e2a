"""Helpers that run the real command line in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from autotune.trial.processes import tagged_processes
from autotune.trial.protocol import RankResult, rank_result_file, read_message
from tests.integration.ranks import small_config

CHECKOUT = Path(__file__).resolve().parents[2]
AUTOTUNE = [sys.executable, "-m", "autotune"]


def write_model(folder: Path, **changes: object) -> Path:
    """Write the small model's config.json, for `--model` and `base_model`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(small_config(**changes)))
    return folder


def search_command(model: Path, out: Path, *more: str) -> list[str]:
    """Two quick families of three rungs each on two CPU ranks, all of which are measured."""
    return [
        *AUTOTUNE, "search", "--model", str(model), "--gpus", "2", "--device", "cpu",
        "--seq-len", "64", "--global-batch-size", "8", "--strategies", "ddp,fsdp2",
        "--micro-batches", "1,2,4", "--sequence-parallel", "1", "--recompute", "none",
        "--sampler", "tpe", "--confirm", "0", "--out", str(out), *more,
    ]  # fmt: skip


def autotune(
    *arguments: str, timeout: float = 240, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the command; away from the checkout it must still find the package."""
    path = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [*AUTOTUNE, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": path},
    )


def start(command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a command that hears Ctrl-C, whatever started the tests.

    A shell starts background jobs with SIGINT ignored, and children inherit that.
    """
    outside = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        with log.open("wb") as output:
            return subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    finally:
        signal.signal(signal.SIGINT, outside)


def wait_until(holds: Callable[[], object], what: str, limit_s: float = 120) -> None:
    deadline = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline, f"waited {limit_s:.0f} s for {what}"
        time.sleep(0.02)


def finished_rungs(launch: Path, rank: int) -> int:
    path = launch / rank_result_file(rank)
    return len(read_message(RankResult, path).rungs) if path.exists() else 0


def rank_pids(launch: Path) -> list[int]:
    """Every process of a launch, found as an outsider would: by its environment."""
    return tagged_processes("AUTOTUNE_LAUNCH_DIR", str(launch.resolve()))


def rank_pid(launch: Path, rank: int) -> int:
    of_launch = set(rank_pids(launch))
    return next(pid for pid in tagged_processes("RANK", str(rank)) if pid in of_launch)


def assert_nothing_left(launch: Path) -> None:
    """No rank, and no child of one, lives on."""
    wait_until(lambda: not rank_pids(launch), f"the processes {rank_pids(launch)} to end", 5)
