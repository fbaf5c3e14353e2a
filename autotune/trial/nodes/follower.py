"""A host that follows: it starts its share of the ranks as the leader says, and tells of them."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from autotune.errors import AutotuneError, NothingFitsError
from autotune.trial.forkserver import ForkServer
from autotune.trial.interrupts import interrupts_held
from autotune.trial.launch import rank_environment
from autotune.trial.native_ops import build_native_ops
from autotune.trial.nodes.hosts import Endpoint, interface_variables
from autotune.trial.nodes.wire import Wire, WireClosed, WrongSecret
from autotune.trial.protocol import (
    REQUEST_FILE,
    Request,
    RungOrder,
    heartbeat_file,
    rank_result_file,
    write_message,
)
from autotune.trial.ranks import TAG_VARIABLE, ColdStarter, RankProcess, Starter, rank_log

WAIT_LIMIT_S = 300.0
_TICK_S = 0.05
_ALIVE_S = 1.0
_SILENT_S = 60.0
"""The leader answers every message; silent for this long, it is lost."""
_TERMINATE_S = 2.0
_STOPPED = ("T", "t")


def starter_here(fork: bool, folder: Path) -> AbstractContextManager[Starter]:
    """Return what starts ranks of this host: by forking, with the server's log in the folder."""
    return ForkServer(folder) if fork else contextlib.nullcontext(ColdStarter())


def follow(
    endpoint: Endpoint,
    *,
    node_rank: int | None,
    secret: bytes,
    description: Mapping[str, Any],
    starters: Callable[[bool, Path], AbstractContextManager[Starter]] = starter_here,
    wait_limit_s: float = WAIT_LIMIT_S,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Serve the leader until it lets this host go.

    Args:
        endpoint: Where the leader listens.
        node_rank: Which host this is; None takes the next that is free.
        secret: What `wire.shared_secret` says.
        description: What must be alike on all hosts, by name.
        starters: Makes what starts the ranks of this host, forking or not, with a folder for logs.
        wait_limit_s: How long to wait for a leader.
        say: Where a line for people goes.

    Raises:
        AutotuneError: the leader refused this host.
        NothingFitsError: there is no leader, or it was lost.
    """
    wire = _connect(endpoint, secret, wait_limit_s)
    try:
        wire.send(
            "join", node_rank=node_rank, hostname=socket.gethostname(), description=description
        )
        answer = wire.receive(30.0)
        if answer is None:
            raise WireClosed("it did not answer")
        if answer["kind"] == "refused":
            raise AutotuneError(f"The leader at {endpoint} refused this host: {answer['why']}")
        say(f"node {answer['node_rank']}, led by {endpoint}")
        with _Serving(wire=wire, address=answer["address"], starters=starters) as serving:
            serving.serve()
    except WireClosed as why:
        raise NothingFitsError(
            f"The leader at {endpoint} was lost: {why}. Its ranks here were stopped; start the "
            "same command again on every host."
        ) from None
    finally:
        wire.close()


def _connect(endpoint: Endpoint, secret: bytes, wait_limit_s: float) -> Wire:
    ends = time.monotonic() + wait_limit_s
    while True:
        connection = None
        try:
            connection = socket.create_connection((endpoint.address(), endpoint.port), timeout=10)
            wire = Wire(connection, secret, accepted=False)
            if wire.receive(10.0) is not None:
                connection = None  # it is the wire's from here on
                return wire
            why = "it said nothing"
        except WrongSecret:
            raise AutotuneError(
                f"The leader at {endpoint} has another secret. Give all hosts the same."
            ) from None
        except (OSError, WireClosed) as error:
            why = str(error)
        finally:
            if connection is not None:
                connection.close()
        if time.monotonic() > ends:
            raise NothingFitsError(
                f"No leader at {endpoint} after {wait_limit_s:.0f} s ({why}). Start the same "
                "command on the host that owns that address."
            )
        time.sleep(0.5)


@dataclass(kw_only=True)
class _Launch:
    """What runs here of a launch."""

    request: Request
    folder: Path
    variables: dict[str, str]
    starter: Starter
    ranks: dict[int, RankProcess] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)
    sent: dict[Path, int] = field(default_factory=dict)
    """Of each file the time of its last change that was sent; of a log the bytes."""


class _Serving:
    """The loop of a host that follows."""

    def __init__(
        self,
        *,
        wire: Wire,
        address: str,
        starters: Callable[[bool, Path], AbstractContextManager[Starter]],
    ) -> None:
        self._wire = wire
        self._address = address
        self._make_starter = starters
        self._stack = contextlib.ExitStack()
        self._starters: dict[bool, Starter] = {}
        self._logs = Path(tempfile.mkdtemp(prefix="autotune-follower-"))
        self._launch: _Launch | None = None
        self._stopped: dict[int, str | None] = {}
        self._said_at = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with interrupts_held():
            self._end_launch()
            self._stack.close()
            shutil.rmtree(self._logs, ignore_errors=True)

    def serve(self) -> None:
        while True:
            message = self._wire.receive(_TICK_S)
            if message is not None and not self._take(message):
                return
            self._tell()
            if message is None and time.monotonic() - self._wire.heard_at > _SILENT_S:
                raise WireClosed(f"it said nothing for {_SILENT_S:.0f} s")

    def _take(self, message: dict[str, Any]) -> bool:
        """Do what the leader says; return False when it lets this host go."""
        match message["kind"]:
            case "launch":
                self._end_launch()
                self._begin(message)
            case "start" if self._launch is not None:
                number = message["rank"]
                launch = self._launch
                rank = launch.starter.start(number, launch.folder, launch.variables)
                launch.ranks[number] = rank
                self._send("started", rank=number, pid=rank.pid)
            case "signal" if self._launch is not None:
                rank = self._launch.ranks[message["rank"]]
                if rank.poll() is None:
                    rank.signal(signal.Signals(message["signal"]))
            case "order" if self._launch is not None:
                order = RungOrder.model_validate_json(message["content"])
                write_message(order, self._launch.folder / Path(message["name"]).name)
            case "sweep":
                self._end_launch()
            case "build":
                # Beside the loop: it takes minutes, and the leader wants to hear from this host.
                request = Request.model_validate(message["request"])
                threading.Thread(target=self._build, args=(request,), daemon=True).start()
            case "bye":
                return False
        return True

    def _begin(self, message: dict[str, Any]) -> None:
        request = Request.model_validate(message["request"])
        folder = Path(tempfile.mkdtemp(prefix="autotune-launch-"))
        if request.mode == "trial":
            request = request.model_copy(update={"out_dir": str(folder)})
        write_message(request, folder / REQUEST_FILE)
        shared = message["variables"]
        own = rank_environment(request, folder, shared[TAG_VARIABLE], message["ranks_per_node"])
        # What names a place or a process of the leader's has its own value here.
        kept = {name: own[name] for name in own if name.startswith("AUTOTUNE_")}
        variables = {**own, **shared, **kept, **interface_variables(self._address)}
        self._launch = _Launch(
            request=request,
            folder=folder,
            variables=variables,
            starter=self._starter(message["fork"]),
        )

    def _starter(self, fork: bool) -> Starter:
        if fork not in self._starters:
            made = self._make_starter(fork, self._logs)
            self._starters[fork] = self._stack.enter_context(made)
        return self._starters[fork]

    def _build(self, request: Request) -> None:
        why_not = ""
        folder = Path(tempfile.mkdtemp(prefix="autotune-build-"))
        try:
            build_native_ops(request, folder)
        except NothingFitsError as error:
            why_not = str(error)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(WireClosed):
            self._send("built", why_not=why_not)

    def _tell(self) -> None:
        """Tell what has changed since the last time, results before exits."""
        now = time.monotonic()
        if self._launch is not None:
            self._tell_files(self._launch)
            self._tell_ranks(self._launch)
        if now - self._said_at > _ALIVE_S:
            self._send("alive")

    def _tell_ranks(self, launch: _Launch) -> None:
        states: dict[int, str | None] = {}
        for number, rank in launch.ranks.items():
            if number in launch.ended:
                continue
            code = rank.poll()
            if code is None:
                states[number] = rank.state()
                continue
            self._tell_files(launch)  # what it wrote last
            launch.ended.add(number)
            left = rank.memory_left()
            self._send("exit", rank=number, code=code, lost=rank.lost(), memory_left=left)
        stopped: dict[int, str | None] = {
            number: state for number, state in states.items() if state in _STOPPED
        }
        if stopped != self._stopped:
            self._stopped = stopped
            self._send("state", states={n: state or "R" for n, state in states.items()})

    def _tell_files(self, launch: _Launch) -> None:
        for number in launch.ranks:
            self._tell_log(launch, number)
            for what, name in (
                ("result", rank_result_file(number)),
                ("heartbeat", heartbeat_file(number)),
            ):
                path = launch.folder / name
                try:
                    changed = path.stat().st_mtime_ns
                except FileNotFoundError:
                    continue
                if changed != launch.sent.get(path):
                    launch.sent[path] = changed
                    self._tell_file(launch, number, what, path.read_text())

    def _tell_log(self, launch: _Launch, number: int) -> None:
        path = rank_log(launch.folder, number)
        if not path.exists():
            return
        with path.open("rb") as log:
            log.seek(launch.sent.get(path, 0))
            new = log.read(2**20)
        if new:
            launch.sent[path] = launch.sent.get(path, 0) + len(new)
            self._tell_file(launch, number, "log", new.decode(errors="replace"))

    def _tell_file(self, launch: _Launch, number: int, what: str, content: str) -> None:
        self._send(
            "file", launch_id=launch.request.launch_id, rank=number, what=what, content=content
        )

    def _send(self, kind: str, **values: Any) -> None:
        self._said_at = time.monotonic()
        self._wire.send(kind, clock=self._said_at, **values)

    def _end_launch(self) -> None:
        launch, self._launch = self._launch, None
        if launch is None:
            return
        running = [rank for rank in launch.ranks.values() if rank.poll() is None]
        for rank in running:
            rank.signal(signal.SIGTERM)
        ends = time.monotonic() + _TERMINATE_S
        while time.monotonic() < ends and any(rank.poll() is None for rank in running):
            time.sleep(0.05)
        for rank in running:
            rank.signal(signal.SIGKILL)
            rank.wait(30)
        launch.starter.kill_stragglers(launch.variables[TAG_VARIABLE])
        with contextlib.suppress(OSError):
            shutil.rmtree(launch.folder)
