"""Where a recording starts its ranks: on this host, or on two that are network namespaces."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence

from netns import Hosts, measure_link
from record_spaces import Landscape
from record_story import network_of

from autotune.trial.forkserver import ForkServer
from autotune.trial.nodes.follower import follow
from autotune.trial.nodes.hosts import Endpoint, installed_versions
from autotune.trial.nodes.leader import Leader
from autotune.trial.nodes.wire import SECRET_VARIABLE, shared_secret
from autotune.trial.ranks import ColdStarter, Starter

PORT = 29400
_JOIN_S = 60.0
_END_S = 30.0


@contextlib.contextmanager
def starters_of(
    landscape: Landscape, args: argparse.Namespace
) -> Iterator[Callable[[str], Starter]]:
    """Return what gives the starter of a launch mode."""
    with ForkServer(args.launches) as server:  # starts at its first use
        here: dict[str, Starter] = {"cold": ColdStarter(), "fork": server}
        if args.lead is None:
            yield here.__getitem__
            return
        with Leader(
            Endpoint.parse(args.lead),
            num_nodes=landscape.hosts,
            ranks_per_node=landscape.ranks // landscape.hosts,
            secret=shared_secret(),
            description=installed_versions(),
            join_limit_s=_JOIN_S,
            say=_say,
        ) as leader:
            yield lambda mode: leader.use(here[mode], fork=mode == "fork")


def follow_leader(endpoint: str) -> None:
    """Serve the recorder on the first host until it lets this one go."""
    follow(
        Endpoint.parse(endpoint),
        node_rank=None,
        secret=shared_secret(),
        description=installed_versions(),
        wait_limit_s=_JOIN_S,
        say=_say,
    )


def on_both_hosts(landscape: Landscape, argv: Sequence[str]) -> int:
    """Make two hosts, and record on the first with the second following; return the exit code."""
    with Hosts(landscape.rate_mbit) as hosts:
        link = measure_link(hosts)
        network = json.dumps(network_of(link, landscape.rate_mbit))
        _say(f"hosts joined: {network}")
        endpoint = f"{hosts.addresses[0]}:{PORT}"
        secret = os.environ | {SECRET_VARIABLE: secrets.token_hex(16)}
        script = [sys.executable, sys.argv[0], *argv]
        follower = hosts.popen(1, [*script, "--follow", endpoint], env=secret)
        leader = hosts.popen(0, [*script, "--lead", endpoint, "--network", network], env=secret)
        try:
            return _wait(leader)
        finally:
            try:
                follower.wait(timeout=_END_S)
            except subprocess.TimeoutExpired:
                follower.kill()


def _wait(leader: subprocess.Popen[bytes]) -> int:
    try:
        return leader.wait()
    except KeyboardInterrupt:  # the leader got it from the terminal as well, and ends its ranks
        return leader.wait(timeout=_END_S)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
