"""A real small all-reduce of every pair of ranks and of all of them, none waited for for ever."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

from autotune.doctor.finding import Finding, broken, ok, warning

ELEMENTS = 2**18
"""Of fp32: 1 MiB, above what NCCL sends with its small-message protocols."""
TIMEOUT_S = 30.0
START_LIMIT_S = 300.0
"""For Python, torch and a CUDA context, on a slow file system."""
_ANSWER_S = 3.0
"""Between a rank's own limit and its answer."""
_SPREAD = 3.0
"""A pair that takes so many times the median is named."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sum:
    """One all-reduce."""

    ranks: tuple[int, ...]
    seconds: float | None = None
    """Of the second one, when the connections stand; None when it did not end well."""
    error: str = ""
    hung: bool = False
    """No answer until the deadline: those that were silent are in `silent`."""
    silent: tuple[int, ...] = ()


class Ranks:
    """Ranks as processes that take orders; those that hang are killed and started again."""

    def __init__(
        self,
        count: int,
        device: Literal["cuda", "cpu"],
        *,
        timeout_s: float = TIMEOUT_S,
        start_limit_s: float = START_LIMIT_S,
    ) -> None:
        self._device = device
        self._timeout_s = timeout_s
        self._start_limit_s = start_limit_s
        self._folder = Path(tempfile.mkdtemp(prefix="autotune-doctor-"))
        self._orders = 0
        self._processes: dict[int, subprocess.Popen[str]] = {}
        self._unable: dict[int, str] = {}
        """Ranks that did not come up, and why: they are not tried again."""
        self._count = count

    def __enter__(self) -> Ranks:
        self.start(range(self._count))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for number in list(self._processes):
            self._kill(number)
        for path in self._folder.iterdir():
            path.unlink()
        self._folder.rmdir()

    def pid(self, number: int) -> int:
        """Return a rank's process id."""
        return self._processes[number].pid

    def start(self, numbers: Sequence[int]) -> None:
        """Start ranks side by side and wait until they are there."""
        for number in numbers:
            with self._log(number).open("ab") as log:
                self._processes[number] = subprocess.Popen(
                    [sys.executable, "-m", "autotune.runner.handshake", str(number), self._device],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    bufsize=1,
                    start_new_session=True,
                    env=os.environ | {"DS_ACCELERATOR": self._device},
                )
        answered = self._listen(numbers, self._start_limit_s)
        for number in numbers:
            answer = answered.get(number, {"error": f"rank {number} did not start in time"})
            if "error" in answer:
                self._unable[number] = answer["error"]
                self._kill(number)

    def all_reduce(self, ranks: Sequence[int]) -> Sum:
        """Sum over some of them; see `all_reduce_side_by_side`."""
        return self.all_reduce_side_by_side([tuple(ranks)])[0]

    def all_reduce_side_by_side(self, groups: Sequence[tuple[int, ...]]) -> list[Sum]:
        """Sum over disjoint groups at once; a silent rank is killed, and started again later."""
        dead = {rank for group in groups for rank in group} - {*self._processes, *self._unable}
        self.start(sorted(dead))
        able = [group for group in groups if not {*group} & {*self._unable}]
        for group in able:
            self._orders += 1
            store = self._folder / f"store-{self._orders}"
            order = {
                "store": str(store), "ranks": list(group), "elements": ELEMENTS,
                "timeout_s": self._timeout_s,
            }  # fmt: skip
            for rank in group:
                with contextlib.suppress(BrokenPipeError):
                    _stdin(self._processes[rank]).write(json.dumps(order) + "\n")
        # The ranks' own limit is shorter: one that waited in vain says so, the stuck one cannot.
        answers = self._listen(
            [rank for group in able for rank in group], self._timeout_s + _ANSWER_S
        )
        answers |= {rank: {"error": why} for rank, why in self._unable.items()}
        return [self._judge(group, answers) for group in groups]

    def _judge(self, group: tuple[int, ...], answers: dict[int, dict[str, Any]]) -> Sum:
        errors_known = {*group} & {*self._unable}
        silent = tuple(rank for rank in group if rank not in answers and not errors_known)
        errors = [answers[rank]["error"] for rank in group if "error" in answers.get(rank, {})]
        for rank in group if silent or errors else ():
            self._kill(rank)  # its group is in no known state
        if silent:
            return Sum(ranks=group, hung=True, silent=silent, error="; ".join(errors[:1]))
        if errors:
            return Sum(ranks=group, error=errors[0])
        return Sum(ranks=group, seconds=max(answers[rank]["sum_s"] for rank in group))

    def _listen(self, numbers: Sequence[int], limit_s: float) -> dict[int, dict[str, Any]]:
        """Return the answer of each that gave one in time; one that ended has an `error`."""
        answers: dict[int, dict[str, Any]] = {}
        ends = time.monotonic() + limit_s
        with selectors.DefaultSelector() as selector:
            for number in numbers:
                selector.register(_stdout(self._processes[number]), selectors.EVENT_READ, number)
            while len(answers) < len(numbers) and (left := ends - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    line = _stdout(self._processes[key.data]).readline()
                    answers[key.data] = json.loads(line) if line else self._ended(key.data)
                    selector.unregister(key.fileobj)
        return answers

    def _ended(self, number: int) -> dict[str, Any]:
        code = self._processes[number].wait()
        lines = self._log(number).read_text(errors="replace").strip().splitlines()
        return {"error": f"rank {number} ended with {code}" + (f": {lines[-1]}" if lines else "")}

    def _kill(self, number: int) -> None:
        process = self._processes.pop(number, None)
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        with contextlib.suppress(BrokenPipeError):  # of an order that it did not take
            _stdin(process).close()
        _stdout(process).close()

    def _log(self, number: int) -> Path:
        return self._folder / f"rank-{number}.log"


def rounds_of_pairs(count: int) -> Iterator[list[tuple[int, int]]]:
    """Yield every pair of `count` ranks once, in rounds of disjoint pairs (the circle method)."""
    seats = [*range(count), *([-1] if count % 2 else [])]
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        met = zip(seats[:half], reversed(seats[half:]), strict=True)
        yield [(min(pair), max(pair)) for pair in met if -1 not in pair]
        seats = [seats[0], seats[-1], *seats[1:-1]]


def try_collectives(ranks: Ranks, count: int) -> list[Sum]:
    """Sum over every pair, then over all."""
    sums = [found for pairs in rounds_of_pairs(count) for found in
            ranks.all_reduce_side_by_side(pairs)]  # fmt: skip
    return sums if count == 2 else [*sums, ranks.all_reduce(range(count))]


def check_collectives(
    count: int, device: Literal["cuda", "cpu"], timeout_s: float = TIMEOUT_S
) -> list[Finding]:
    """Run `try_collectives` on fresh processes and say what came of it."""
    with Ranks(count, device, timeout_s=timeout_s) as ranks:
        return collective_findings(try_collectives(ranks, count), device, timeout_s)


def collective_findings(
    sums: Sequence[Sum], device: Literal["cuda", "cpu"], timeout_s: float
) -> list[Finding]:
    """Put sums into words: each that hung or failed by name, pairs much slower than others."""
    library = "NCCL" if device == "cuda" else "gloo"
    found = [_failure(each, library, device, timeout_s) for each in sums if each.seconds is None]
    pairs = sorted(
        (s.seconds, s.ranks) for s in sums if s.seconds is not None and len(s.ranks) == 2
    )
    if pairs:
        median = pairs[len(pairs) // 2][0]
        slow = [ranks for seconds, ranks in pairs if seconds > _SPREAD * median]
        if slow and device == "cuda":  # CPU ranks share cores, and their times say nothing
            found.append(
                warning("allreduce", f"slower than the others: {', '.join(map(_named, slow))}",
                        "nvidia-smi topo -m shows how they are joined; PCI ACS on a bridge slows "
                        "peer access, NVIDIA recommends switching it off.")
            )  # fmt: skip
    whole = [each for each in sums if each.seconds is not None]
    if len(whole) == len(sums):
        most = max(sums, key=lambda each: len(each.ranks))
        found.insert(
            0, ok("allreduce", f"{library}: every pair of {len(most.ranks)} ranks and all of them "
                  f"sum 1 MiB, all in {(most.seconds or 0) * 1e3:.1f} ms")
        )  # fmt: skip
    return found


def _failure(each: Sum, library: str, device: str, timeout_s: float) -> Finding:
    who = _named(each.ranks)
    if device == "cuda":
        do = (
            "Try NCCL_P2P_DISABLE=1 (no peer access), then NCCL_IB_DISABLE=1 (no InfiniBand) and "
            "NCCL_SOCKET_IFNAME=INTERFACE; NCCL_DEBUG=INFO says where it stops. Longer waits at "
            "the start of a run: ddp_timeout."
        )
    else:
        do = "Name the loopback or network interface: GLOO_SOCKET_IFNAME=lo."
    if each.hung:
        silent = ", ".join(map(str, each.silent))
        seen = f"{library} hung: {who}, no answer of rank {silent} within {timeout_s:g} s"
    else:
        seen = f"{library} failed: {who}: {each.error}"
    return broken("allreduce", seen, do)


def _named(ranks: Sequence[int]) -> str:
    return f"pair {ranks[0]}-{ranks[1]}" if len(ranks) == 2 else f"all {len(ranks)} ranks"


def _stdin(process: subprocess.Popen[str]) -> IO[str]:
    assert process.stdin is not None
    return process.stdin


def _stdout(process: subprocess.Popen[str]) -> IO[str]:
    assert process.stdout is not None
    return process.stdout
