"""Ctrl-C during what must not be cut short."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from autotune.trial.interrupts import first_interrupt_only, interrupts_held


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """A shell starts background jobs with SIGINT ignored; Python then installs no handler."""
    outside = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, outside)


def test_ctrl_c_waits_until_the_ranks_are_stopped() -> None:
    with interrupts_held():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_after_the_first_ctrl_c_the_others_are_ignored_to_the_end() -> None:
    with first_interrupt_only():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        with interrupts_held():
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)


def test_without_ctrl_c_nothing_changes() -> None:
    with first_interrupt_only(), interrupts_held():
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_background_job_stays_deaf() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with first_interrupt_only():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
