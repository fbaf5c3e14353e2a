"""Ctrl-C, so that an impatient second one neither leaves ranks behind nor costs results.

Only the main thread gets it, and only there may a handler be set: elsewhere nothing is done.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back; what runs inside must have a time limit of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def first_interrupt_only() -> Iterator[None]:
    """Let the first Ctrl-C raise KeyboardInterrupt, and ignore the others until the process ends.

    To hold them back from an `except KeyboardInterrupt` on would be too late: the second may come
    before it. Where SIGINT is ignored already, as in a shell's background jobs, it stays so.
    """
    before = signal.getsignal(signal.SIGINT)
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or before is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _raise_once)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is _raise_once:
            signal.signal(signal.SIGINT, before)


def _raise_once(_number: int, _frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt
