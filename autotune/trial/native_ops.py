"""Build DeepSpeed's native operators before any deadline runs.

A rank killed during such a build leaves a lock file, and every later run waits for it for ever.
Here the builds happen first, in a process of their own, in a folder of ours, under a file lock of
ours. Ranks then only load what was built, which holds torch's lock for about a second: a lock older
than `_LOADING_S` belongs to nobody alive and is removed.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from autotune.errors import NothingFitsError
from autotune.plan import Engine, Plan
from autotune.trial.launch import native_ops_dir, rank_environment
from autotune.trial.processes import kill_tagged
from autotune.trial.protocol import Request
from autotune.trial.ranks import TAG_VARIABLE

_BUILD_LIMIT_S = 900
_LOADING_S = 10.0
"""A rank that loads a built operator holds its lock for less than this."""


def needed_ops(plan: Plan, device: str) -> list[str]:
    """Return the builders of `deepspeed.ops.op_builder` a plan will load."""
    if plan.engine is not Engine.DEEPSPEED:
        return []
    ops = ["ShareMemCommBuilder"] if device == "cpu" else []
    return [*ops, "CPUAdamBuilder"] if plan.offload_optimizer else ops


def build_native_ops(
    request: Request,
    folder: Path,
    *,
    note: list[str] | None = None,
    environment: Mapping[str, str] | None = None,
) -> float:
    """Build what the request's plan needs; return the seconds it took (0 when nothing is needed).

    Raises:
        NothingFitsError: the compiler failed; its last words are in the message.
    """
    ops = needed_ops(request.plan_object(), request.device)
    if not ops:
        return 0.0
    started = time.monotonic()
    cache = native_ops_dir()
    cache.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    with (cache / ".autotune.lock").open("w") as own_lock:
        fcntl.flock(own_lock, fcntl.LOCK_EX)
        removed = remove_stale_locks(cache)
        if removed and note is not None:
            note.append(f"removed a stale build lock of {', '.join(sorted(removed))}")
        _build(request, folder, ops, environment or {})
    return time.monotonic() - started


def remove_stale_locks(cache: Path) -> list[str]:
    """Remove the dead locks of torch's extension builder; only while holding our own lock.

    A young lock may be that of a rank of another launch, which fails when its lock vanishes: it is
    given the time to let go. One that was taken anew meanwhile is that of a rank that lives.
    """
    removed = []
    for lock in cache.glob("**/lock"):
        taken_at = _taken_at(lock)
        while _taken_at(lock) == taken_at:
            if taken_at is None or time.time() - taken_at >= _LOADING_S:
                break
            time.sleep(0.1)
        else:
            continue
        if taken_at is not None:
            lock.unlink(missing_ok=True)
            removed.append(lock.parent.name)
    return removed


def _taken_at(lock: Path) -> float | None:
    try:
        return lock.stat().st_mtime
    except FileNotFoundError:
        return None


def _build(
    request: Request, folder: Path, ops: Iterable[str], environment: Mapping[str, str]
) -> None:
    tag = f"ops-{request.launch_id}-{os.getpid()}"
    log = folder / "native_ops.log"
    with log.open("wb") as output:
        try:
            done = subprocess.run(
                [sys.executable, "-m", "autotune.runner.native_ops", json.dumps(list(ops))],
                env=rank_environment(request, folder, tag, 1) | dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=_BUILD_LIMIT_S,
            )
        except subprocess.TimeoutExpired as error:
            raise NothingFitsError(
                f"DeepSpeed's native operators were not built in {_BUILD_LIMIT_S} s; see {log}."
            ) from error
        finally:
            kill_tagged(TAG_VARIABLE, tag)  # ninja and the compilers
    if done.returncode != 0:
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        raise NothingFitsError(
            f"DeepSpeed's native operators ({', '.join(ops)}) could not be built: "
            f"{' '.join(last)} (see {log}). A C++ compiler and ninja are needed."
        )
