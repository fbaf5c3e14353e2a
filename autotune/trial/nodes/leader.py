"""The host that leads: it launches, and has the others start their share of the ranks."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from autotune.trial.launch import rank_environment
from autotune.trial.nodes.gathering import Gathering
from autotune.trial.nodes.hosts import Endpoint, interface_variables
from autotune.trial.nodes.remote import BUILD_LIMIT_S
from autotune.trial.protocol import REQUEST_FILE, Request, read_message, rung_file
from autotune.trial.ranks import TAG_VARIABLE, ColdStarter, RankProcess, Starter

JOIN_LIMIT_S = 300.0
REJOIN_LIMIT_S = 60.0
"""How long a launch waits for a host that was lost, before the search gives up."""
_ORDERS_S = 0.02
"""How often the launch's folder is looked at for orders to pass on."""
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
        self._hosts = Gathering(
            endpoint, num_nodes=num_nodes, secret=secret, description=description, say=say
        )
        self._ranks_per_node = ranks_per_node
        self._local = local or ColdStarter()
        self._fork = fork
        self._join_limit_s = join_limit_s
        self._launch_over = threading.Event()

    def __enter__(self) -> Self:
        self._hosts.open()
        with ExitStack() as joined:
            joined.callback(self.close)  # on Ctrl-C too the hosts that joined are let go
            self._hosts.wait_for_all(self._join_limit_s)
            joined.pop_all()
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
        self._hosts.close()

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
        return self._hosts.host(node).start_rank(number)

    def notes(self) -> list[str]:
        """Return what is to be known of the starts here."""
        return self._local.notes()

    def kill_stragglers(self, tag: str) -> None:
        """Kill what carries the tag, on every host."""
        self._launch_over.set()
        self._local.kill_stragglers(tag)
        for host in self._hosts.hosts():
            host.sweep(tag)

    def build_native_ops(self, request: Request) -> None:
        """Have the other hosts build what a request needs, and wait until they have.

        Raises:
            NothingFitsError: one could not, or was lost.
        """
        for host in self._hosts.hosts():
            host.ask_build(request)
        ends = time.monotonic() + BUILD_LIMIT_S
        for host in self._hosts.hosts():
            host.await_build(ends)

    def _begin(self, folder: Path, variables: Mapping[str, str]) -> None:
        self._hosts.wait_for_all(REJOIN_LIMIT_S)
        request = read_message(Request, folder / REQUEST_FILE)
        # What the launch itself set, and nothing of this host's: that may hold the secret.
        shared = {k: v for k, v in variables.items() if k.startswith("AUTOTUNE_")}
        shared = {k: v for k, v in shared.items() if k not in os.environ}
        shared |= {name: variables[name] for name in _SHARED_VARIABLES}
        shared["MASTER_ADDR"] = self._hosts.address
        for host in self._hosts.hosts():
            host.begin(
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
                    for host in self._hosts.hosts():
                        host.order(path.name, path.read_text())

    def _own_variables(self, folder: Path, variables: Mapping[str, str]) -> dict[str, str]:
        """Return the environment of a rank of this host: it is one of several."""
        request = read_message(Request, folder / REQUEST_FILE)
        own = rank_environment(request, folder, variables[TAG_VARIABLE], self._ranks_per_node)
        return {
            **variables,
            "LOCAL_WORLD_SIZE": str(self._ranks_per_node),
            "OMP_NUM_THREADS": own["OMP_NUM_THREADS"],
            "MASTER_ADDR": self._hosts.address,
            **interface_variables(self._hosts.address),
        }
