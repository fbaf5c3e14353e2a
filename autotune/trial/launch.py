"""Start the ranks of one launch, watch them, and leave nothing behind.

The ranks are started here, not by torchrun: torchrun puts them into sessions of their own, where a
killed search would not reach them. Output goes to files, never to pipes; every wait has a limit.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from autotune.errors import AutotuneError
from autotune.resources import cache_dir
from autotune.trial.folder import clear_results, read_result, read_results
from autotune.trial.interrupts import interrupts_held
from autotune.trial.processes import oom_kill_count
from autotune.trial.protocol import (
    REQUEST_FILE,
    Outcome,
    RankResult,
    Request,
    heartbeat_file,
    write_message,
)
from autotune.trial.ranks import TAG_VARIABLE, ColdStarter, RankProcess, Starter

_POLL_S = 0.1
_STOPPED_S = 3.0
"""A rank that a signal stopped for this long hangs the others."""
_LAST_WORDS_S = 3.0
"""After one rank failed, how long the others may take to say what they saw."""
_EXIT_S = 20.0
"""After a rank's complete result, how long its process may take to end."""
_TERMINATE_S = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """When a launch is given up."""

    deadline_s: float | None
    """From its start; None for a full training run."""
    hang_s: float
    """Without a sign of progress from any rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """How a launch ended, before its results are read."""

    outcome: Outcome
    message: str
    rank: int | None
    """The rank that caused it."""
    exit_codes: list[int | None]
    elapsed_s: float
    notes: list[str] = field(default_factory=list)
    results: list[RankResult] = field(default_factory=list)
    """What every rank wrote, complete or not; by rank."""


@dataclass(kw_only=True, slots=True)
class _Rank:
    number: int
    process: RankProcess
    alive_at: float
    """When it was last seen running: it ended after this, and at the latest at `ended_at`."""
    stopped_since: float | None = None
    ended_at: float | None = None


def run_launch(
    request: Request,
    folder: Path,
    limits: Limits,
    *,
    on_tick: Callable[[], None] = lambda: None,
    environment: dict[str, str] | None = None,
    starter: Starter | None = None,
) -> Ended:
    """Run all ranks of a request to their end and return how they ended.

    Args:
        request: what to run.
        folder: where request, logs and results of this launch go; created.
        limits: when to give up.
        on_tick: called about ten times a second, for progress displays.
        environment: more variables for the ranks.
        starter: what starts them; without it each is a fresh interpreter on this host.

    Raises:
        AutotuneError: what a rank found to be the user's mistake, such as wrong dataset columns.
        KeyboardInterrupt: passed on after the ranks were stopped.
    """
    folder.mkdir(parents=True, exist_ok=True)
    world = request.plan_object().world_size
    tag = f"{request.launch_id}-{os.getpid()}-{time.time_ns()}"
    # What lies here from an earlier launch must not be taken for an answer of this one.
    request = request.model_copy(update={"launch_id": tag})
    clear_results(folder)
    write_message(request, folder / REQUEST_FILE)
    variables = rank_environment(request, folder, tag, world) | (environment or {})
    oom_kills, started = oom_kill_count(), time.monotonic()
    starter = starter or ColdStarter()
    ranks: list[_Rank] = []
    try:
        for number in range(world):
            # One by one: should the next start fail, those before it must be stopped.
            process = starter.start(number, folder, variables)
            ranks.append(_Rank(number=number, process=process, alive_at=time.monotonic()))
        verdict = _watch(ranks, folder, tag, limits, started, on_tick)
    finally:
        with interrupts_held():
            _stop(ranks)
            starter.kill_stragglers(tag)
    results = read_results(folder)
    for result in results:
        if result.error is not None and result.error.user_mistake:
            raise AutotuneError(result.error.message)
    elapsed = time.monotonic() - started
    # On CUDA the limit is the allocator's own, and says so in Python.
    limited = request.device == "cpu" and request.memory_limit_bytes is not None
    killed = oom_kill_count() > oom_kills
    return _conclude(ranks, results, verdict, elapsed, host_out_of_memory=killed, limited=limited)


def rank_environment(request: Request, folder: Path, tag: str, world: int) -> dict[str, str]:
    """Return the variables every rank of a launch shares."""
    # What `accelerate launch` left in a shell would change what the ranks run.
    foreign = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")
    variables = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    package_parent = str(Path(__file__).resolve().parents[2])
    variables |= {
        TAG_VARIABLE: tag,
        "AUTOTUNE_LAUNCH_DIR": str(folder.resolve()),
        "AUTOTUNE_PARENT_PID": str(os.getpid()),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [package_parent, os.environ.get("PYTHONPATH")])),
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_EXTENSIONS_DIR": str(native_ops_dir()),
        # A file of the user's called datasets.py must not stand for the library.
        "PYTHONSAFEPATH": "1",
        # Looking for a GPU must not create a CUDA context.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    }
    threads = max(1, len(os.sched_getaffinity(0)) // world)
    if request.device == "cpu":
        variables |= {
            "CUDA_VISIBLE_DEVICES": "",
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": str(threads),
            # Freed blocks go back to the kernel at once, so that RLIMIT_DATA and the resident peak
            # follow the live tensors (edge at 1.13 instead of 1.67 times the live bytes).
            "MALLOC_MMAP_THRESHOLD_": "65536",
        }
    else:
        variables.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        # NVML numbers GPUs by bus; CUDA would number the fastest first.
        variables.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
        # Without it each rank would start a thread a core, and CPU Adam would measure too slow.
        variables.setdefault("OMP_NUM_THREADS", str(threads))
    return variables


def native_ops_dir() -> Path:
    """Return where DeepSpeed's native operators are built: a folder of ours, so its locks are."""
    return cache_dir() / "torch_extensions"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Verdict:
    """Why the watch ended early; None in its place means that every rank ended by itself."""

    outcome: Outcome
    message: str
    rank: int | None


def _watch(
    ranks: list[_Rank],
    folder: Path,
    launch_id: str,
    limits: Limits,
    started: float,
    on_tick: Callable[[], None],
) -> _Verdict | None:
    first_failure: float | None = None
    all_well: float | None = None
    while True:
        now = time.monotonic()
        for rank in ranks:
            if rank.ended_at is not None:
                continue
            if rank.process.poll() is None:
                rank.alive_at = now
                continue
            rank.ended_at = now
            if not _finished_well(folder, rank.number, launch_id):
                first_failure = first_failure or now
        if all(rank.ended_at is not None for rank in ranks):
            return None
        if first_failure is not None and now - first_failure > _LAST_WORDS_S:
            return None
        if first_failure is None and all(
            rank.ended_at or _finished_well(folder, rank.number, launch_id) for rank in ranks
        ):
            all_well = all_well or now
            if now - all_well > _EXIT_S:
                return None  # a process will not end, but every result is complete and counts
        if first_failure is None:
            verdict = _stalled(ranks, folder, limits, started, now)
            if verdict is not None:
                return verdict
        on_tick()
        time.sleep(_POLL_S)


def _stalled(
    ranks: list[_Rank], folder: Path, limits: Limits, started: float, now: float
) -> _Verdict | None:
    for rank in ranks:
        if rank.process.state() in ("T", "t"):
            rank.stopped_since = rank.stopped_since or now
            if now - rank.stopped_since > _STOPPED_S:
                return _Verdict(
                    outcome=Outcome.HANG,
                    message=f"rank {rank.number} was stopped by a signal and did not continue",
                    rank=rank.number,
                )
        else:
            rank.stopped_since = None
    silence, slowest = _silence(ranks, folder)
    if silence > limits.hang_s:
        return _Verdict(
            outcome=Outcome.HANG,
            message=f"no rank made progress for {limits.hang_s:.0f} s; rank {slowest} was last",
            rank=slowest,
        )
    if limits.deadline_s is not None and now - started > limits.deadline_s:
        return _Verdict(
            outcome=Outcome.TIMEOUT,
            message=f"still running at its deadline of {limits.deadline_s:.0f} s",
            rank=None,
        )
    return None


def _silence(ranks: list[_Rank], folder: Path) -> tuple[float, int]:
    """Return the seconds since any rank's last sign of life, and the rank silent the longest."""
    ages = {}
    for rank in ranks:
        try:
            modified = (folder / heartbeat_file(rank.number)).stat().st_mtime
        except FileNotFoundError:  # still importing
            return 0.0, rank.number
        ages[rank.number] = time.time() - modified
    return min(ages.values()), max(ages, key=lambda number: ages[number])


def _stop(ranks: list[_Rank]) -> None:
    """Ask, then force. A stopped process ignores SIGTERM, so it gets no second chance."""
    running = [rank for rank in ranks if rank.process.poll() is None]
    for rank in running:
        rank.process.signal(signal.SIGTERM)
    deadline = time.monotonic() + _TERMINATE_S
    while time.monotonic() < deadline and any(r.process.poll() is None for r in running):
        time.sleep(0.05)
    for rank in running:
        rank.process.signal(signal.SIGKILL)  # the whole group, so a rank's children go too
    for rank in running:
        rank.process.wait(30)  # in the kernel, freeing its memory


def _conclude(
    ranks: list[_Rank],
    results: list[RankResult],
    verdict: _Verdict | None,
    elapsed: float,
    *,
    host_out_of_memory: bool,
    limited: bool,
) -> Ended:
    exit_codes = [rank.process.returncode for rank in ranks]
    outcome, message, culprit, notes = Outcome.OK, "", None, []
    if verdict is not None:
        outcome, message, culprit = verdict.outcome, verdict.message, verdict.rank
    else:
        failures = []
        for rank, result in zip(ranks, results, strict=True):
            if result.error is not None:
                error = result.error
                failures.append((error.time_s, rank.number, error.outcome, error.message))
            elif not result.complete and rank.ended_at is not None:
                how, kind = _describe_exit(
                    rank.process.returncode, host_out_of_memory=host_out_of_memory, limited=limited
                )
                # Its death is noticed late, and by then the others have met its silence.
                failures.append((rank.alive_at, rank.number, kind, f"rank {rank.number} {how}"))
            elif result.complete and rank.process.returncode != 0:
                notes.append(
                    f"rank {rank.number} finished, then ended with {rank.process.returncode}"
                )
        if failures:
            _, culprit, outcome, message = min(failures)
        elif not all(result.complete for result in results):
            outcome, message = Outcome.CRASHED, "a rank left no complete result"
    return Ended(
        outcome=outcome,
        message=message,
        rank=culprit,
        exit_codes=exit_codes,
        elapsed_s=elapsed,
        notes=notes,
        results=results,
    )


def _describe_exit(
    code: int | None, *, host_out_of_memory: bool, limited: bool
) -> tuple[str, Outcome]:
    """Say how a rank ended; `limited` ranks have an RLIMIT_DATA."""
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        if name == "SIGKILL" and host_out_of_memory:
            return "was killed by the kernel: the host ran out of memory", Outcome.HOST_OOM
        if name == "SIGABRT" and limited:
            # C++ that finds no memory, for a thread say, calls std::terminate: nothing to catch.
            return "aborted under its memory limit, as C++ does without memory", Outcome.OOM
        return f"was killed by {name}", Outcome.CRASHED
    return f"ended with code {code} and no complete result", Outcome.CRASHED


def _finished_well(folder: Path, number: int, launch_id: str) -> bool:
    result = read_result(folder, number, launch_id)
    return result is not None and result.complete and result.error is None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
