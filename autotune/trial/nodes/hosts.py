"""What a host is: its addresses and interfaces, and what it must have in common with the others."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

from autotune.errors import AutotuneError

_VERSIONED = ("autotune-llm", "torch", "transformers", "accelerate", "deepspeed")
_SIOCGIFADDR = 0x8915


@dataclass(frozen=True, kw_only=True, slots=True)
class Endpoint:
    """Where the leader listens."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``HOST:PORT``; an IPv6 address stands in brackets.

        Raises:
            AutotuneError: it is not one.
        """
        host, _, port = text.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise AutotuneError(
                f"--rdzv-endpoint {text!r}: HOST:PORT is needed, the address of one of the hosts "
                "and a free port on it, such as 10.0.0.1:29400."
            )
        return cls(host=host, port=int(port))

    def __str__(self) -> str:
        return f"{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    def address(self) -> str:
        """Return the numeric address.

        Raises:
            AutotuneError: the name is not known here.
        """
        try:
            return str(socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0][4][0])
        except socket.gaierror as error:
            raise AutotuneError(
                f"--rdzv-endpoint {self}: {self.host} is not known here ({error.strerror}). Give "
                "an address, or a name that every host resolves."
            ) from None


def is_here(address: str) -> bool:
    """Say whether a numeric address is one of this host's."""
    with socket.socket(_family(address)) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def interface_of(address: str) -> str | None:
    """Return the interface that packets to an address leave by: its own, if it is of this host.

    None where it cannot be told; gloo and NCCL then choose themselves.
    """
    with socket.socket(_family(address), socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # sends nothing
        except OSError:
            return None
        own = probe.getsockname()[0]
    wanted = address if is_here(address) else own
    return _interfaces(_family(address)).get(str(wanted).partition("%")[0])


def interface_variables(address: str) -> dict[str, str]:
    """Return the variables that make gloo and NCCL use the interface that reaches an address."""
    name = interface_of(address)
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    return {key: os.environ.get(key, name) for key in names} if name else {}


def _interfaces(family: socket.AddressFamily) -> dict[str, str]:
    """Return the interfaces by their addresses."""
    if family is socket.AF_INET6:
        table = Path("/proc/net/if_inet6")  # address in hex, four numbers, name
        lines = [line.split() for line in table.read_text().splitlines()] if table.exists() else []
        return {
            socket.inet_ntop(socket.AF_INET6, bytes.fromhex(words[0])): words[-1] for words in lines
        }
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(
                    probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name[:15].encode())
                )
            except OSError:  # without an IPv4 address
                continue
            found[socket.inet_ntoa(answer[20:24])] = name
    return found


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def installed_versions() -> dict[str, str]:
    """Return what decides how ranks run here; the hosts of a launch must have it alike."""
    found = {"python": sys.version.split()[0]}
    for name in _VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Name what differs between two hosts' descriptions; empty when nothing does."""
    names = [name for name in sorted({*there, *here}) if there.get(name) != here.get(name)]
    return "; ".join(f"{name} {there.get(name)} there, {here.get(name)} here" for name in names)
