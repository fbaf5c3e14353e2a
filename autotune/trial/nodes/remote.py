"""Another host and its ranks, as the leader knows them: by the messages that come from there."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autotune.errors import NothingFitsError
from autotune.trial.nodes.wire import Wire, WireClosed
from autotune.trial.protocol import (
    Outcome,
    Phase,
    RankError,
    RankResult,
    Request,
    heartbeat_file,
    rank_result_file,
    read_message,
    write_message,
)
from autotune.trial.ranks import rank_log

BUILD_LIMIT_S = 900.0
_SILENT_S = 180.0
"""A host says something every second, but not while its fork server imports; then it is lost."""
_LOST_CODE = 255


@dataclass(kw_only=True)
class RemoteHost:
    """A host that follows. One thread listens to it; any may tell it something.

    What it says of a launch ends up in the launch's folder, as if its ranks ran here.
    """

    node: int
    name: str
    wire: Wire
    lost: str | None = None
    ranks: dict[int, RemoteRank] = field(default_factory=dict)
    folder: Path | None = None
    launch_id: str = ""
    world_size: int = 0
    built: str | None = None
    """What came of the last build: empty when it went well, None while it runs."""
    clock_offset_s: float | None = None
    """What to add to its `time.monotonic` to get this host's."""
    leaving: bool = False
    gone: threading.Event = field(default_factory=threading.Event)

    def begin(self, request: Request, folder: Path, **launch: Any) -> None:
        """Tell it of a launch that is to come; what else `launch` holds goes with it."""
        self.ranks = {}
        self.folder, self.launch_id = folder, request.launch_id
        self.world_size = request.plan_object().world_size
        self._send("launch", request=request.model_dump(mode="json"), **launch)

    def start_rank(self, number: int) -> RemoteRank:
        """Have it start a rank of that launch; one of a lost host has ended at once."""
        rank = self.ranks[number] = RemoteRank(self, number)
        if self.lost is not None:
            rank.end(_LOST_CODE)
        self._send("start", rank=number)
        return rank

    def signal(self, number: int, what: signal.Signals) -> None:
        """Have it signal a rank's group."""
        self._send("signal", rank=number, signal=int(what))

    def order(self, name: str, content: str) -> None:
        """Pass on what the ranks are told while they run."""
        self._send("order", name=name, content=content)

    def sweep(self, tag: str) -> None:
        """Have it kill what carries the tag: the launch is over."""
        self.folder = None
        self._send("sweep", tag=tag)

    def ask_build(self, request: Request) -> None:
        """Have it build what a request needs, beside all else."""
        self.built = None
        self._send("build", request=request.model_dump(mode="json"))

    def await_build(self, ends: float) -> None:
        """Wait until it has built that.

        Raises:
            NothingFitsError: it could not, or was lost, or `ends` on `time.monotonic()` has come.
        """
        while self.built is None and self.lost is None and time.monotonic() < ends:
            time.sleep(0.05)
        if self.built != "":
            why = self.lost or self.built or f"not done after {BUILD_LIMIT_S:.0f} s"
            raise NothingFitsError(f"Native operators on {self.name}: {why}")

    def let_go(self) -> None:
        """Tell it that nothing more will come."""
        self.leaving = True
        self._send("bye")
        self.wire.finish()

    def _send(self, kind: str, **values: Any) -> None:
        """Send; that a host is gone is found by who listens to it."""
        with contextlib.suppress(WireClosed):
            self.wire.send(kind, **values)

    def listen(self) -> None:
        """Take in its messages until it is lost."""
        why = ""
        try:
            while True:
                message = self.wire.receive(1.0)
                if message is not None:
                    self._take(message)
                if time.monotonic() - self.wire.heard_at > _SILENT_S:
                    why = f"it said nothing for {_SILENT_S:.0f} s"
                    break
                if not self.leaving:
                    self._send("alive")
        except WireClosed as closed:
            why = str(closed)
        self._end_all(why)
        self.wire.close()
        self.gone.set()

    def _take(self, message: dict[str, Any]) -> None:
        now = time.monotonic()
        behind = now - float(message.get("clock", now))
        known = self.clock_offset_s
        # The quickest message tells best how far the clocks are apart.
        self.clock_offset_s = behind if known is None else min(known, behind)
        match message["kind"]:
            case "file" if message["launch_id"] == self.launch_id and self.folder is not None:
                self._keep(self.folder, message)
            case "state":
                for number, state in message["states"].items():
                    if int(number) in self.ranks:
                        self.ranks[int(number)].last_state = state
            case "started" if message["rank"] in self.ranks:
                self.ranks[message["rank"]].pid = message["pid"]
            case "exit" if message["rank"] in self.ranks:
                self.ranks[message["rank"]].end(
                    message["code"], lost=message["lost"], memory_left=message["memory_left"]
                )
            case "built":
                self.built = message["why_not"]

    def _keep(self, folder: Path, message: dict[str, Any]) -> None:
        number, content = message["rank"], message["content"]
        match message["what"]:
            case "heartbeat":
                (folder / heartbeat_file(number)).touch()
            case "log":
                with rank_log(folder, number).open("a") as log:
                    log.write(content)
            case "result":
                result = RankResult.model_validate_json(content)
                if result.error is not None:
                    moved = result.error.time_s + (self.clock_offset_s or 0.0)
                    result.error = result.error.model_copy(update={"time_s": moved})
                write_message(result, folder / rank_result_file(number))
                (folder / heartbeat_file(number)).touch()

    def _end_all(self, why: str) -> None:
        """Say of every rank it had under way that it went with its host."""
        heard_at = self.wire.heard_at
        self.lost = why
        for number, rank in self.ranks.items():
            if rank.returncode is None and self.folder is not None:
                path = self.folder / rank_result_file(number)
                said = read_message(RankResult, path) if path.exists() else None
                if said is None or not said.complete:
                    phase = said.phase if said else Phase.LOAD
                    write_message(self._lost_result(number, heard_at, phase), path)
            rank.end(_LOST_CODE)

    def _lost_result(self, number: int, heard_at: float, phase: Phase) -> RankResult:
        message = f"rank {number} was lost with its host, {self.name}: {self.lost}"
        return RankResult(
            launch_id=self.launch_id,
            rank=number,
            world_size=self.world_size,
            complete=True,
            phase=phase,
            error=RankError(
                outcome=Outcome.CRASHED, message=message, traceback="", time_s=heard_at
            ),
        )


class RemoteRank:
    """A rank of another host (a `RankProcess`)."""

    def __init__(self, host: RemoteHost, number: int) -> None:
        self._host = host
        self._number = number
        self._ended = threading.Event()
        self.pid = 0
        """On its host; 0 until that said so."""
        self.returncode: int | None = None
        self._lost: str | None = None
        self._memory_left: int | None = None
        self.last_state: str | None = "R"

    def end(self, code: int, *, lost: str | None = None, memory_left: int | None = None) -> None:
        """Note its exit code and what its host says of it (`RankProcess`); the first counts."""
        if self.returncode is None:
            self._lost, self._memory_left = lost, memory_left
            self.returncode = code
            self._ended.set()

    def poll(self) -> int | None:
        """Return its exit code as far as its host has told."""
        return self.returncode

    def state(self) -> str | None:
        """Return its state letter, as its host saw it last."""
        return None if self._ended.is_set() else self.last_state

    def signal(self, number: signal.Signals) -> None:
        """Have its host signal its group."""
        self._host.signal(self._number, number)

    def wait(self, timeout_s: float) -> int | None:
        """Wait until its host says that it ended."""
        self._ended.wait(timeout_s)
        return self.returncode

    def memory_left(self) -> int | None:
        """Return what its host saw of it last."""
        return self._memory_left

    def lost(self) -> str | None:
        """Say how the fork server of its host died, where that ended it."""
        return self._lost
