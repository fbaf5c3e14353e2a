"""Which hosts are there: they join the leader over the network, and are lost."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from autotune.errors import NothingFitsError
from autotune.trial.nodes.hosts import Endpoint, differences
from autotune.trial.nodes.remote import RemoteHost
from autotune.trial.nodes.wire import Wire, WireClosed

_LET_GO_S = 5.0


class Gathering:
    """The other hosts of a search. `open` listens for them, `close` lets them go.

    Args:
        endpoint: Where this host listens.
        num_nodes: Hosts, this one included.
        secret: What `wire.shared_secret` says.
        description: What must be alike on all hosts, by name.
        say: Where a line for people goes.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        num_nodes: int,
        secret: bytes,
        description: Mapping[str, Any],
        say: Callable[[str], None],
    ) -> None:
        self.address = endpoint.address()
        """Numeric."""
        self._endpoint = endpoint
        self._num_nodes = num_nodes
        self._secret = secret
        self._description = dict(description)
        self._say = say
        self._changed = threading.Condition()
        self._hosts: dict[int, RemoteHost] = {}
        self._closing = False

    def open(self) -> None:
        """Listen from now on.

        Raises:
            NothingFitsError: this host cannot listen there.
        """
        family = socket.AF_INET6 if ":" in self.address else socket.AF_INET
        try:
            self._listener = socket.create_server(
                (self.address, self._endpoint.port), family=family
            )
        except OSError as error:
            raise NothingFitsError(
                f"--rdzv-endpoint {self._endpoint}: this host cannot listen there "
                f"({error.strerror}). Give a free port of an address of this host."
            ) from None
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Let the other hosts go."""
        self._closing = True
        self._listener.close()
        hosts = self.hosts()
        for host in hosts:
            host.let_go()
        ends = time.monotonic() + _LET_GO_S
        for host in hosts:
            host.gone.wait(max(0.0, ends - time.monotonic()))
            host.wire.close()

    def hosts(self) -> list[RemoteHost]:
        """Return the hosts that have joined, those that were lost since included."""
        return list(self._hosts.values())

    def host(self, node: int) -> RemoteHost:
        """Return the host of a node rank."""
        return self._hosts[node]

    def wait_for_all(self, limit_s: float) -> None:
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
        here = {node for node, host in self._hosts.items() if host.lost is None}
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
                wire.send("welcome", node_rank=node, address=self.address)
                self._hosts[node] = RemoteHost(node=node, name=name, wire=wire)
                self._changed.notify_all()
        if node is None:
            with contextlib.suppress(WireClosed):
                wire.send("refused", why=why_not)
            self._say(f"refused {name}: {why_not}")
            wire.close()
            return
        self._say(f"node {node} is {name}")
        host = self._hosts[node]
        host.listen()
        if not self._closing:
            self._say(f"node {node}, {name}, is lost: {host.lost}")

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
