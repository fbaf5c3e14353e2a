"""Messages between the hosts: JSON objects in authenticated frames over one TCP connection.

Both ends hold a secret. Each frame carries an HMAC-SHA256 over its direction, its number and its
content, under a key made of the secret and a random number of either end, so that nobody without
the secret can say anything, and nothing can be said twice. The content is not encrypted.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import select
import socket
import struct
import threading
import time
from typing import Any

from autotune.errors import AutotuneError

SECRET_VARIABLE = "AUTOTUNE_RDZV_SECRET"
SECRET_FILE_VARIABLE = "AUTOTUNE_RDZV_SECRET_FILE"

_GREETING = b"autotune-nodes 1\n"
"""Both ends send it first: another version of the frames, or another program, ends there."""
_NONCE_BYTES = 32
_HEADER = struct.Struct(">I32s")
_LARGEST_BYTES = 256 * 2**20
_IO_LIMIT_S = 30.0


class WireClosed(Exception):
    """The other end is gone, or what came is not from it."""


class WrongSecret(WireClosed):
    """The first frame does not fit the secret of this end."""


def shared_secret() -> bytes:
    """Return the secret that this host was given.

    Raises:
        AutotuneError: there is none, or its file cannot be read.
    """
    text = os.environ.get(SECRET_VARIABLE, "")
    name = os.environ.get(SECRET_FILE_VARIABLE, "")
    if not text and name:
        try:
            with open(name) as file:
                text = file.read()
        except OSError as error:
            raise AutotuneError(
                f"{SECRET_FILE_VARIABLE} {name}: {error.strerror}. Give a file that can be read."
            ) from None
    if not text.strip():
        raise AutotuneError(
            f"Launches over several hosts need a secret that all of them know, or anyone on the "
            f"network could start processes here. Set {SECRET_VARIABLE} to the same text on every "
            f"host, or {SECRET_FILE_VARIABLE} to a file that holds it."
        )
    return text.strip().encode()


class Wire:
    """One connection, seen from one of its ends.

    Any thread may send; one receives.

    Args:
        connection: An open socket; the wire closes it.
        secret: Of both ends.
        accepted: Whether this end accepted the connection (it then speaks first).

    Raises:
        WireClosed: the other end speaks something else.
    """

    def __init__(self, connection: socket.socket, secret: bytes, *, accepted: bool) -> None:
        self._socket = connection
        self._socket.settimeout(_IO_LIMIT_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = b""
        self._lock = threading.Lock()
        self._sent, self._received = 0, 0
        self._ways = (b"a", b"c") if accepted else (b"c", b"a")
        self.heard_at = time.monotonic()
        """When the last message came."""
        mine = os.urandom(_NONCE_BYTES)
        self._write(_GREETING + mine)
        greeting = self._exactly(len(_GREETING))
        if greeting != _GREETING:
            raise WireClosed("the other end speaks another protocol")
        theirs = self._exactly(_NONCE_BYTES)
        both = mine + theirs if accepted else theirs + mine
        self._key = hmac.digest(secret, both, "sha256")

    def send(self, kind: str, **values: Any) -> None:
        """Send a message.

        Raises:
            WireClosed: the other end is gone.
        """
        content = json.dumps({"kind": kind, **values}).encode()
        with self._lock:
            mark = self._mark(self._ways[0], self._sent, content)
            self._sent += 1
            self._write(_HEADER.pack(len(content), mark) + content)

    def receive(self, timeout_s: float) -> dict[str, Any] | None:
        """Return the next message; None when none came in time.

        Raises:
            WireClosed: the other end is gone.
            WrongSecret: it has another secret.
        """
        ends = time.monotonic() + timeout_s
        while (message := self._complete()) is None:
            left = max(0.0, ends - time.monotonic())
            try:
                ready, _, _ = select.select([self._socket], [], [], left)
            except (OSError, ValueError):  # closed here meanwhile
                raise WireClosed("the connection was closed") from None
            if not ready:
                return None
            self._read_some()
        self.heard_at = time.monotonic()
        return message

    def finish(self) -> None:
        """Say no more, but go on hearing: what was said arrives before the end of it."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close the connection; the other end notices."""
        self._socket.close()

    def _complete(self) -> dict[str, Any] | None:
        if len(self._buffer) < _HEADER.size:
            return None
        size, mark = _HEADER.unpack_from(self._buffer)
        if size > _LARGEST_BYTES:
            raise WireClosed("a frame is too large")
        if len(self._buffer) < _HEADER.size + size:
            return None
        content = self._buffer[_HEADER.size : _HEADER.size + size]
        self._buffer = self._buffer[_HEADER.size + size :]
        if not hmac.compare_digest(mark, self._mark(self._ways[1], self._received, content)):
            first = self._received == 0
            raise WrongSecret("another secret") if first else WireClosed("a frame was forged")
        self._received += 1
        message: dict[str, Any] = json.loads(content)
        return message

    def _mark(self, way: bytes, number: int, content: bytes) -> bytes:
        return hmac.digest(self._key, way + number.to_bytes(8, "big") + content, "sha256")

    def _exactly(self, size: int) -> bytes:
        while len(self._buffer) < size:
            self._read_some()
        found, self._buffer = self._buffer[:size], self._buffer[size:]
        return found

    def _read_some(self) -> None:
        try:
            data = self._socket.recv(2**20)
        except OSError as error:
            raise WireClosed(f"the connection broke: {error}") from None
        if not data:
            raise WireClosed("the connection was closed")
        self._buffer += data

    def _write(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise WireClosed(f"the connection broke: {error}") from None
