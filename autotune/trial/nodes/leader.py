"""The host that leads: it launches, and has the others start their share of the ranks."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from autotune.errors import NothingFitsError
from autotune.trial.launch import rank_environment
from autotune.trial.nodes.hosts import Endpoint, differences, interface_of
from autotune.trial.nodes.wire import Wire, WireClosed
from autotune.trial.protocol import (
    REQUEST_FILE,
    Outcome,
    RankError,
    RankResult,
    Request,
    heartbeat_file,
    rank_result_file,
    read_message,
    rung_file,
    write_message,
)
from autotune.trial.ranks import TAG_VARIABLE, ColdStarter, RankProcess, Starter, rank_log

JOIN_LIMIT_S = 300.0
REJOIN_LIMIT_S = 60.0
"""How long a launch waits for a host that was lost, before the search gives up."""
BUILD_LIMIT_S = 900.0
_SILENT_S = 180.0
"""A host says something every second, but not while its fork server imports; then it is lost."""
_LET_GO_S = 5.0
_ORDERS_S = 0.02
"""How often the launch's folder is looked at for orders to pass on."""
_LOST_CODE = 255
_SHARED_VARIABLES = ("MASTER_PORT", "WORLD_SIZE")


class Leader:
    """Starts the ranks of this host by itself and those of the others over the wire.

    Args:
        endpoint: Where this host listens, and where the ranks of all hosts meet.
        num_nodes: Hosts, this one included.
        ranks_per_node: The same on each.
        secret: What `wire.shared_secret` says.
        description: What must be alike on all hosts, by name.
        local: Starts the ranks of this host.
        fork: Whether the other hosts fork theirs as well.
        join_limit_s: How long `with` waits for the other hosts.
        say: Where a line for people goes.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        num_nodes: int,
        ranks_per_node: int,
        secret: bytes,
        description: Mapping[str, Any],
        local: Starter | None = None,
        fork: bool = False,
        join_limit_s: float = JOIN_LIMIT_S,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._endpoint = endpoint
        self._num_nodes = num_nodes
        self._ranks_per_node = ranks_per_node
        self._secret = secret
        self._description = dict(description)
        self._local = local or ColdStarter()
        self._fork = fork
        self._join_limit_s = join_limit_s
        self._say = say
        self._changed = threading.Condition()
        self._launch_over = threading.Event()
        self._followers: dict[int, _Follower] = {}
        self._address = endpoint.address()
        self._closing = False

    def __enter__(self) -> Self:
        family = socket.AF_INET6 if ":" in self._address else socket.AF_INET
        try:
            self._listener = socket.create_server(
                (self._address, self._endpoint.port), family=family
            )
        except OSError as error:
            raise NothingFitsError(
                f"--rdzv-endpoint {self._endpoint}: this host cannot listen there "
                f"({error.strerror}). Give a free port of an address of this host."
            ) from None
        threading.Thread(target=self._accept, daemon=True).start()
        try:
            self._wait_for_all(self._join_limit_s)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let the other hosts go."""
        self._closing = True
        self._listener.close()
        followers = list(self._followers.values())
        for follower in followers:
            follower.let_go()
        ends = time.monotonic() + _LET_GO_S
        for follower in followers:
            follower.gone.wait(max(0.0, ends - time.monotonic()))
            follower.wire.close()

    def use(self, local: Starter, *, fork: bool) -> Self:
        """Start ranks so from now on: those of this host by `local`, the others' likewise."""
        self._local, self._fork = local, fork
        return self

    def start(self, number: int, folder: Path, variables: Mapping[str, str]) -> RankProcess:
        """Start a rank; the first of a launch waits for a host that was lost to come back.

        Raises:
            NothingFitsError: it did not.
        """
        if number == 0:
            self._begin(folder, variables)
        node = number // self._ranks_per_node
        if node == 0:
            return self._local.start(number, folder, self._own_variables(folder, variables))
        return self._followers[node].start_rank(number)

    def notes(self) -> list[str]:
        """Return what is to be known of the starts here."""
        return self._local.notes()

    def kill_stragglers(self, tag: str) -> None:
        """Kill what carries the tag, on every host."""
        self._launch_over.set()
        self._local.kill_stragglers(tag)
        for follower in list(self._followers.values()):
            follower.sweep(tag)

    def build_native_ops(self, request: Request) -> None:
        """Have the other hosts build what a request needs, and wait until they have.

        Raises:
            NothingFitsError: one could not, or was lost.
        """
        for follower in list(self._followers.values()):
            follower.ask_build(request)
        ends = time.monotonic() + BUILD_LIMIT_S
        for follower in list(self._followers.values()):
            follower.await_build(ends)

    def _begin(self, folder: Path, variables: Mapping[str, str]) -> None:
        self._wait_for_all(REJOIN_LIMIT_S)
        request = read_message(Request, folder / REQUEST_FILE)
        # What the launch itself set, and nothing of this host's: that may hold the secret.
        shared = {k: v for k, v in variables.items() if k.startswith("AUTOTUNE_")}
        shared = {k: v for k, v in shared.items() if k not in os.environ}
        shared |= {name: variables[name] for name in _SHARED_VARIABLES}
        shared["MASTER_ADDR"] = self._address
        for follower in self._followers.values():
            follower.begin(
                request,
                folder,
                variables=shared,
                ranks_per_node=self._ranks_per_node,
                fork=self._fork,
            )
        self._launch_over.set()
        self._launch_over = threading.Event()
        if request.converses:
            threading.Thread(
                target=self._forward_orders, args=(folder, self._launch_over), daemon=True
            ).start()

    def _forward_orders(self, folder: Path, over: threading.Event) -> None:
        """Pass on what the ranks are told while they run, until the launch is over."""
        passed: set[str] = set()
        while not over.wait(_ORDERS_S):
            for path in sorted(folder.glob(rung_file("*"))):
                if path.name not in passed:
                    passed.add(path.name)
                    for follower in list(self._followers.values()):
                        follower.order(path.name, path.read_text())

    def _own_variables(self, folder: Path, variables: Mapping[str, str]) -> dict[str, str]:
        """Return the environment of a rank of this host: it is one of several."""
        request = read_message(Request, folder / REQUEST_FILE)
        own = rank_environment(request, folder, variables[TAG_VARIABLE], self._ranks_per_node)
        return {
            **variables,
            "LOCAL_WORLD_SIZE": str(self._ranks_per_node),
            "OMP_NUM_THREADS": own["OMP_NUM_THREADS"],
            "MASTER_ADDR": self._address,
            **interface_variables(self._address),
        }

    def _wait_for_all(self, limit_s: float) -> None:
        """Wait until every host is there.

        Raises:
            NothingFitsError: one is not, after the limit.
        """
        ends = time.monotonic() + limit_s
        with self._changed:
            while missing := self._missing():
                left = ends - time.monotonic()
                if left <= 0:
                    nodes = ", ".join(map(str, missing))
                    raise NothingFitsError(
                        f"Of {self._num_nodes} hosts {self._num_nodes - len(missing)} are there "
                        f"after {limit_s:.0f} s; node {nodes} is not. Start the same command on "
                        f"every host, with --rdzv-endpoint {self._endpoint}."
                    )
                self._changed.wait(min(left, 0.5))

    def _missing(self) -> list[int]:
        here = {node for node, follower in self._followers.items() if follower.lost is None}
        return sorted(set(range(1, self._num_nodes)) - here)

    def _accept(self) -> None:
        while not self._closing:
            try:
                connection, address = self._listener.accept()
            except OSError:
                return
            # Each by itself: one that says nothing must not keep the others out.
            threading.Thread(
                target=self._greet, args=(connection, str(address[0])), daemon=True
            ).start()

    def _greet(self, connection: socket.socket, address: str) -> None:
        try:
            wire = Wire(connection, self._secret, accepted=True)
            wire.send("leader")  # by which the other end knows that the secrets are equal
            hello = wire.receive(10.0)
        except WireClosed as why:
            self._say(f"turned away {address}: {why}")
            connection.close()
            return
        if hello is None or hello.get("kind") != "join":
            connection.close()
            return
        name = f"{hello['hostname']} ({address})"
        with self._changed:
            node, why_not = self._place_of(hello)
            if node is not None:
                wire.send("welcome", node_rank=node, address=self._address)
                self._followers[node] = _Follower(node=node, name=name, wire=wire)
                self._changed.notify_all()
        if node is None:
            with contextlib.suppress(WireClosed):
                wire.send("refused", why=why_not)
            self._say(f"refused {name}: {why_not}")
            wire.close()
            return
        self._say(f"node {node} is {name}")
        follower = self._followers[node]
        follower.listen()
        if not self._closing:
            self._say(f"node {node}, {name}, is lost: {follower.lost}")

    def _place_of(self, hello: Mapping[str, Any]) -> tuple[int | None, str]:
        """Return the node rank of a host that wants to join, or None and why it may not."""
        differ = differences(hello["description"], self._description)
        if differ:
            return None, f"the hosts differ ({differ}). Make them alike and start again."
        missing = self._missing()
        wanted = hello["node_rank"]
        if wanted is None:
            return (missing[0], "") if missing else (None, "all hosts are there already")
        if wanted in missing:
            return wanted, ""
        return None, f"--node-rank {wanted}: {missing or 'none'} is free"


def interface_variables(address: str) -> dict[str, str]:
    """Return the variables that make gloo and NCCL use the interface that reaches an address."""
    name = interface_of(address)
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    return {key: os.environ.get(key, name) for key in names} if name else {}


@dataclass(kw_only=True)
class _Follower:
    """Another host, as its messages say it is."""

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
        self.ranks = {}
        self.folder, self.launch_id = folder, request.launch_id
        self.world_size = request.plan_object().world_size
        self._send("launch", request=request.model_dump(mode="json"), **launch)

    def start_rank(self, number: int) -> RemoteRank:
        rank = self.ranks[number] = RemoteRank(self, number)
        if self.lost is not None:
            rank.end(_LOST_CODE)
        self._send("start", rank=number)
        return rank

    def signal(self, number: int, what: signal.Signals) -> None:
        self._send("signal", rank=number, signal=int(what))

    def order(self, name: str, content: str) -> None:
        self._send("order", name=name, content=content)

    def sweep(self, tag: str) -> None:
        self.folder = None
        self._send("sweep", tag=tag)

    def ask_build(self, request: Request) -> None:
        self.built = None
        self._send("build", request=request.model_dump(mode="json"))

    def await_build(self, ends: float) -> None:
        while self.built is None and self.lost is None and time.monotonic() < ends:
            time.sleep(0.05)
        if self.built != "":
            why = self.lost or self.built or f"not done after {BUILD_LIMIT_S:.0f} s"
            raise NothingFitsError(f"Native operators on {self.name}: {why}")

    def let_go(self) -> None:
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
                self.ranks[message["rank"]].end(message["code"], lost=message["lost"])
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
                if not path.exists() or not read_message(RankResult, path).complete:
                    write_message(self._lost_result(number, heard_at), path)
            rank.end(_LOST_CODE)

    def _lost_result(self, number: int, heard_at: float) -> RankResult:
        message = f"rank {number} was lost with its host, {self.name}: {self.lost}"
        return RankResult(
            launch_id=self.launch_id,
            rank=number,
            world_size=self.world_size,
            complete=True,
            error=RankError(
                outcome=Outcome.CRASHED, message=message, traceback="", time_s=heard_at
            ),
        )


class RemoteRank:
    """A rank of another host (a `RankProcess`)."""

    def __init__(self, follower: _Follower, number: int) -> None:
        self._follower = follower
        self._number = number
        self._ended = threading.Event()
        self.pid = 0
        """On its host; 0 until that said so."""
        self.returncode: int | None = None
        self._lost: str | None = None
        self.last_state: str | None = "R"

    def end(self, code: int, *, lost: str | None = None) -> None:
        """Note its exit code and what its host says of `RankProcess.lost`; the first counts."""
        if self.returncode is None:
            self._lost = lost
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
        self._follower.signal(self._number, number)

    def wait(self, timeout_s: float) -> int | None:
        """Wait until its host says that it ended."""
        self._ended.wait(timeout_s)
        return self.returncode

    def lost(self) -> str | None:
        """Say how the fork server of its host died, where that ended it."""
        return self._lost
