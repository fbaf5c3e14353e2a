"""Start the ranks of one launch, watch them, and leave nothing behind.

The ranks are started here, not by torchrun: torchrun puts them into sessions of their own, where a
killed search would not reach them. Output goes to files, never to pipes; every wait has a limit.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from autotune.errors import AutotuneError
from autotune.resources import cache_dir
from autotune.trial.folder import clear_results, read_results
from autotune.trial.interrupts import interrupts_held
from autotune.trial.processes import oom_kill_count
from autotune.trial.protocol import (
    REQUEST_FILE,
    STARTED_VARIABLE,
    Outcome,
    Request,
    write_message,
)
from autotune.trial.ranks import TAG_VARIABLE, ColdStarter, Starter
from autotune.trial.verdict import Ended, conclude
from autotune.trial.watch import Limits, Rank, Seen, Verdict, stop, watch

__all__ = [
    "Ended",
    "Limits",
    "Running",
    "native_ops_dir",
    "rank_environment",
    "run_launch",
]


class Running:
    """The ranks of one launch under way. Whoever makes one calls `end`, whatever happens."""

    def __init__(
        self,
        request: Request,
        folder: Path,
        *,
        environment: dict[str, str] | None = None,
        starter: Starter | None = None,
    ) -> None:
        """Prepare the folder; `start` starts the ranks."""
        folder.mkdir(parents=True, exist_ok=True)
        # What lies here from an earlier launch must not be taken for an answer of this one.
        tag = f"{request.launch_id}-{os.getpid()}-{time.time_ns()}"
        self.request = request.model_copy(update={"launch_id": tag})
        self.folder = folder
        clear_results(folder)
        write_message(self.request, folder / REQUEST_FILE)
        self._starter = starter or ColdStarter()
        self._environment = environment or {}
        self._oom_kills = oom_kill_count()
        self._verdict: Verdict | None = None
        self.started = time.monotonic()
        self.ranks: list[Rank] = []

    @property
    def tag(self) -> str:
        """The launch's own id."""
        return self.request.launch_id

    def start(self) -> None:
        """Start every rank, one by one: should one fail, `end` stops those before it."""
        world = self.request.plan_object().world_size
        variables = rank_environment(self.request, self.folder, self.tag, world)
        variables |= self._environment
        for number in range(world):
            process = self._starter.start(number, self.folder, variables)
            self.ranks.append(Rank(number=number, process=process, alive_at=time.monotonic()))

    def watch(
        self,
        *,
        hang_s: float,
        deadline: tuple[float, str] | None,
        on_tick: Callable[[], None] = lambda: None,
        until: Callable[[], bool] = lambda: False,
        poll_s: float = 0.1,
    ) -> bool:
        """Watch the ranks; return whether `until` holds, else the launch is over: call `end`.

        See `autotune.trial.watch.watch` for the arguments.
        """
        seen = watch(
            self.ranks,
            self.folder,
            self.tag,
            hang_s=hang_s,
            deadline=deadline,
            on_tick=on_tick,
            until=until,
            poll_s=poll_s,
        )
        if isinstance(seen, Verdict):
            self._verdict = seen
        return seen is Seen.HOLDS

    def stop(self) -> None:
        """Stop what still runs, and whatever it started."""
        with interrupts_held():
            stop(self.ranks)
            self._starter.kill_stragglers(self.tag)

    def lost(self) -> str | None:
        """Say how what forked a rank of the stopped launch died and took it along, if so."""
        return next(filter(None, (rank.process.lost() for rank in self.ranks)), None)

    def end(self) -> Ended:
        """Return how the stopped launch ended.

        Raises:
            AutotuneError: what a rank found to be the user's mistake.
        """
        results = read_results(self.folder)
        for result in results:
            if result.error is not None and result.error.user_mistake:
                raise AutotuneError(result.error.message)
        return conclude(
            self.ranks,
            results,
            self._verdict,
            time.monotonic() - self.started,
            host_out_of_memory=oom_kill_count() > self._oom_kills,
            memory_limit_bytes=self.request.memory_limit_bytes,
        )


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
        starter: what starts them; without it each is a fresh interpreter on this host. Should it
            die and take ranks along, the launch gets a second try.

    Raises:
        AutotuneError: what a rank found to be the user's mistake, such as wrong dataset columns.
        KeyboardInterrupt: passed on after the ranks were stopped.
    """
    notes: list[str] = []
    for second in (False, True):
        running = Running(request, folder, environment=environment, starter=starter)
        deadline = None
        if limits.deadline_s is not None:
            said = f"its deadline of {limits.deadline_s:.0f} s"
            deadline = running.started + limits.deadline_s, said
        try:
            running.start()
            running.watch(hang_s=limits.hang_s, deadline=deadline, on_tick=on_tick)
        finally:
            running.stop()
        ended = running.end()
        lost = running.lost()
        notes += starter.notes() if starter is not None else []
        if lost is None or second or ended.outcome is Outcome.OK:
            break
        notes.append(f"{lost}; the launch is repeated")
    return replace(ended, notes=[*notes, *ended.notes])


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
        STARTED_VARIABLE: repr(time.monotonic()),
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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
