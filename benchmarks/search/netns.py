"""Two hosts on one machine: network namespaces joined by a veth pair with a limited rate.

    python benchmarks/search/netns.py [--rate-mbit 1000] -- COMMAND ...

runs COMMAND on both at once, as on two machines: each has an address of its own (HOST_ADDRESS in
the environment, HOST_RANK 0 and 1, LEADER_ADDRESS of the first) and half of the cores. Memory and
files are shared, the processes see each other. Needs root. The namespaces are removed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from autotune.errors import AutotuneError

_NETWORK = "10.77.0"
_BURST = "256kb"
_QUEUE = "50ms"


class Hosts:
    """The namespaces, from `with` to its end.

    Args:
        rate_mbit: Of the link, each way; None leaves it as fast as the kernel copies.
        delay_us: Added each way; needs the kernel's netem, and is refused without it.
    """

    def __init__(self, rate_mbit: int | None = None, delay_us: int = 0) -> None:
        self.rate_mbit = rate_mbit
        self.delay_us = delay_us
        self.names = [f"autotune-{os.getpid()}-{number}" for number in (0, 1)]
        self.addresses = [f"{_NETWORK}.{number + 1}" for number in (0, 1)]
        cores = sorted(os.sched_getaffinity(0))
        half = max(1, len(cores) // 2)
        # One core is shared, and then measured by both; two or more are each host's own.
        self.cores = [cores[:half], cores[half:] or cores]

    def __enter__(self) -> Self:
        why = why_not()
        if why:
            raise AutotuneError(why)
        with ExitStack() as made:
            made.callback(self._remove)
            self._set_up()
            made.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._remove()

    def _set_up(self) -> None:
        links = [f"at{os.getpid()}h{number}" for number in (0, 1)]
        for name in self.names:
            _run("ip", "netns", "add", name)
        _run("ip", "link", "add", links[0], "type", "veth", "peer", "name", links[1])
        for name, link, address in zip(self.names, links, self.addresses, strict=True):
            _run("ip", "link", "set", link, "netns", name, "name", "eth0")
            _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            _run("ip", "-n", name, "link", "set", "lo", "up")
            _run("ip", "-n", name, "link", "set", "eth0", "up")
            if self.delay_us:
                shape = ["netem", "delay", f"{self.delay_us}us"]
                shape += ["rate", f"{self.rate_mbit}mbit"] if self.rate_mbit else []
                _run("tc", "-n", name, "qdisc", "add", "dev", "eth0", "root", *shape)
            elif self.rate_mbit:
                shape = ["rate", f"{self.rate_mbit}mbit", "burst", _BURST, "latency", _QUEUE]
                _run("tc", "-n", name, "qdisc", "add", "dev", "eth0", "root", "tbf", *shape)

    def _remove(self) -> None:
        for name in self.names:  # the veth pair goes with the first
            subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)

    def popen(self, host: int, command: Sequence[str], **more: Any) -> subprocess.Popen[bytes]:
        """Start a command on a host, on its cores."""
        environment = os.environ | {
            "HOST_ADDRESS": self.addresses[host],
            "HOST_RANK": str(host),
            "LEADER_ADDRESS": self.addresses[0],
        }
        cores = ",".join(map(str, self.cores[host]))
        # `ip netns exec` and taskset replace themselves: the process started is the command.
        return subprocess.Popen(
            ["ip", "netns", "exec", self.names[host], "taskset", "-c", cores, *command],
            env=environment | more.pop("env", {}),
            **more,
        )


def why_not() -> str | None:
    """Return why namespaces cannot be made here; None where they can."""
    missing = [tool for tool in ("ip", "tc", "taskset") if shutil.which(tool) is None]
    if missing:
        return f"Network namespaces need {', '.join(missing)} (iproute2 and util-linux)."
    capable = _effective_capabilities()
    needed = {"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21}
    lacking = [name for name, bit in needed.items() if not capable >> bit & 1]
    if lacking:
        return f"Network namespaces need {' and '.join(lacking)}: run this as root."
    return None


def _effective_capabilities() -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("CapEff:"))
    return int(line.split()[1], 16)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        hint = ""
        if "qdisc kind is unknown" in done.stderr:
            hint = " This kernel cannot shape a link so; leave the delay out."
        raise AutotuneError(f"{' '.join(command)}: {done.stderr.strip()}{hint}")


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredLink:
    """What a TCP connection between the hosts does."""

    bytes_per_s: float
    round_trip_s: float
    """Median of a byte there and back."""


def measure_link(hosts: Hosts) -> MeasuredLink:
    """Measure the link by one TCP connection from the first host to the second."""
    me = os.path.abspath(__file__)
    server = hosts.popen(
        1, [sys.executable, me, "--serve"], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL
    )
    try:
        assert server.stdout is not None
        port = server.stdout.readline().decode().strip()
        client = hosts.popen(
            0,
            [sys.executable, me, "--connect", f"{hosts.addresses[1]}:{port}"],
            stdout=subprocess.PIPE,
        )
        output, _ = client.communicate(timeout=120)
        return MeasuredLink(**json.loads(output))
    finally:
        server.kill()
        server.communicate()


_BYTES = 64 * 2**20
_ROUNDS = 200


def _serve() -> None:
    with socket.create_server(("0.0.0.0", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        connection, _ = listener.accept()
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for _ in range(_ROUNDS):
                connection.sendall(connection.recv(1))
            left = _BYTES
            while left:
                left -= len(connection.recv(min(left, 2**20)))
            connection.sendall(b"x")


def _connect(endpoint: str) -> None:
    host, _, port = endpoint.rpartition(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        trips = []
        for _ in range(_ROUNDS):
            started = time.perf_counter()
            connection.sendall(b"x")
            connection.recv(1)
            trips.append(time.perf_counter() - started)
        started = time.perf_counter()
        connection.sendall(bytes(_BYTES))
        connection.recv(1)
        rate = _BYTES / (time.perf_counter() - started)
    print(json.dumps({"bytes_per_s": rate, "round_trip_s": statistics.median(trips)}))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rate-mbit", type=int, help="default: unlimited")
    parser.add_argument("--delay-us", type=int, default=0, help="each way (default: none)")
    parser.add_argument("--measure", action="store_true", help="print what the link does")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--connect", help=argparse.SUPPRESS)
    parser.add_argument("command", nargs="*")
    args = parser.parse_args()
    if args.serve or args.connect:
        _serve() if args.serve else _connect(args.connect)
        return 0
    if not args.command and not args.measure:
        parser.error("a COMMAND after -- is needed, or --measure")
    try:
        with Hosts(args.rate_mbit, args.delay_us) as hosts:
            if args.measure:
                link = measure_link(hosts)
                print(
                    f"{link.bytes_per_s * 8e-6:.0f} Mbit/s, there and back in "
                    f"{link.round_trip_s * 1e6:.0f} us"
                )
            if not args.command:
                return 0
            return run_on_both(hosts, args.command)
    except AutotuneError as error:
        print(f"netns: {error}", file=sys.stderr)
        return error.exit_code


def run_on_both(hosts: Hosts, command: Sequence[str]) -> int:
    """Run a command on both hosts to its end; return the first exit code that is not 0."""
    running = [hosts.popen(host, command) for host in (0, 1)]
    try:
        return next((code for process in running if (code := process.wait())), 0)
    except KeyboardInterrupt:  # the commands of this terminal got it as well
        return next((code for process in running if (code := process.wait(timeout=60))), 130)
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()


if __name__ == "__main__":
    sys.exit(main())
