"""The progress view on a real pseudo-terminal, as a terminal emulator shows it."""

from __future__ import annotations

import fcntl
import os
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pyte = pytest.importorskip("pyte")

ROOT = Path(__file__).resolve().parents[2]
_HEIGHT = 20
PM = "\N{PLUS-MINUS SIGN}"


class Terminal:
    """A terminal emulator around a running script."""

    def __init__(self, width: int) -> None:
        self._own, self.theirs = os.openpty()
        self.screen = pyte.Screen(width, _HEIGHT)
        self._stream = pyte.ByteStream(self.screen)
        self.seen = b""
        self.resize(width)

    def resize(self, width: int) -> None:
        size = struct.pack("HHHH", _HEIGHT, width, 0, 0)
        fcntl.ioctl(self._own, termios.TIOCSWINSZ, size)
        self.screen.resize(_HEIGHT, width)

    def lines(self) -> list[str]:
        """What is on the screen, without the empty lines."""
        return [line.rstrip() for line in self.screen.display if line.strip()]

    def read_for(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if select.select([self._own], [], [], left)[0]:
                try:
                    data = os.read(self._own, 1 << 16)
                except OSError:  # the script has ended and closed its side
                    return
                self.seen += data
                self._stream.feed(data)

    def read_until(self, text: str, limit_s: float = 60.0) -> None:
        until = time.monotonic() + limit_s
        while not any(text in line for line in self.lines()):
            assert time.monotonic() < until, f"{text!r} never came: {self.lines()}"
            self.read_for(0.1)

    def close(self) -> None:
        os.close(self._own)


@contextmanager
def searching(width: int, **environment: str) -> Iterator[Terminal]:
    """The scripted search, standing still in its second launch; it ends with the block."""
    terminal = Terminal(width)
    theirs, ours = os.pipe()
    kept = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    script = subprocess.Popen(
        [sys.executable, "-m", "tests.unit.progress_script", str(theirs)],
        cwd=ROOT,
        env=kept | {"TERM": "xterm-256color"} | environment,
        stdin=terminal.theirs,
        stdout=terminal.theirs,
        stderr=terminal.theirs,
        pass_fds=[theirs],
        start_new_session=True,
    )
    os.close(terminal.theirs)
    os.close(theirs)
    try:
        terminal.read_until("[2/3] 1 min 05 s")
        yield terminal
        os.write(ours, b"x")
        terminal.read_for(10)
        assert script.wait(timeout=30) == 0
    finally:
        os.close(ours)
        script.kill()
        script.wait()
        terminal.close()


def test_sixty_columns():
    with searching(60) as terminal:
        lines = terminal.lines()
    assert lines == [
        "  zero2 mbs=4 x ga=8: 16,384 tokens/s, 625.0 MiB a rank,",
        f"  step 2.00 s, {PM}2%  best so far",
        "  zero2 mbs=8 x ga=4: out of memory: rank 1: RuntimeError:",
        "  [enforce fail at alloc_cpu.cpp:121] err == 0.",
        "  DefaultCPUAllocator: can't al...",
        "Study in study: tiny-qwen3 on 2 x cpu ranks, sequence 256,",
        "global batch 8",
        lines[7],
        "time   1 min 35 s, 8 min 25 s of the budget left",
        "trials 1 measured, 1 failed",
        "best   zero2 mbs=4 x ga=8: 16,384 tokens/s, 625.0 MiB a ran\N{HORIZONTAL ELLIPSIS}",
        "now    [2/3] 1 min 05 s  fsdp2_no_reshard recompute, micro \N{HORIZONTAL ELLIPSIS}",
    ]
    assert set(lines[7]) <= set("\u2501\u2578\u257a") and len(lines[7]) == 60, "the bar"


def test_two_hundred_columns():
    with searching(200) as terminal:
        lines = terminal.lines()
    assert lines == [
        f"  zero2 mbs=4 x ga=8: 16,384 tokens/s, 625.0 MiB a rank, step 2.00 s, {PM}2%"
        "  best so far",
        "  zero2 mbs=8 x ga=4: out of memory: rank 1: RuntimeError: [enforce fail at "
        "alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't al...",
        "Study in study: tiny-qwen3 on 2 x cpu ranks, sequence 256, global batch 8",
        lines[3],
        "time   1 min 35 s, 8 min 25 s of the budget left",
        "trials 1 measured, 1 failed",
        f"best   zero2 mbs=4 x ga=8: 16,384 tokens/s, 625.0 MiB a rank, step 2.00 s, {PM}2%",
        "now    [2/3] 1 min 05 s  fsdp2_no_reshard recompute, micro batch 1, 2, 4, 8, 16",
    ]


@pytest.mark.parametrize(("before", "after"), [(60, 200), (200, 60)])
def test_resized_while_it_runs(before, after):
    with searching(before) as terminal:
        terminal.resize(after)
        terminal.read_for(1.5)
        lines = terminal.lines()
        now = [line for line in lines if line.startswith("now ")]
        assert len(now) == 1, "the lines are not left behind"
        assert now[0].endswith("micro batch 1, 2, 4, 8, 16" if after == 200 else "\u2026")
        assert all(len(line) <= after for line in lines)
    assert not any(line.startswith(("now ", "time ")) for line in terminal.lines()), "taken away"


def test_no_color_moves_without_colours():
    with searching(80, NO_COLOR="1") as terminal:
        assert terminal.lines()[-1].startswith("now    [2/3]")
    cells = [cell for row in terminal.screen.buffer.values() for cell in row.values()]
    assert {cell.fg for cell in cells} == {"default"}
    with searching(80) as coloured:
        pass
    cells = [cell for row in coloured.screen.buffer.values() for cell in row.values()]
    assert len({cell.fg for cell in cells}) > 1, "the check sees colours where they are allowed"


def test_a_log_file_gets_plain_lines_and_no_control_character(tmp_path):
    theirs, ours = os.pipe()
    os.write(ours, b"x")
    log = tmp_path / "search.log"
    with log.open("wb") as file:
        subprocess.run(
            [sys.executable, "-m", "tests.unit.progress_script", str(theirs)],
            cwd=ROOT, env=os.environ | {"COLUMNS": "40"}, pass_fds=[theirs], check=True,
            stdin=subprocess.DEVNULL, stdout=file, stderr=file,
        )  # fmt: skip
    os.close(theirs)
    os.close(ours)
    text = log.read_text()
    assert not [character for character in text if ord(character) < 32 and character != "\n"]
    lines = text.splitlines()
    assert lines[0] == "[1/3] running zero2 cp=2, micro batch 1, 2, 4, 8"
    assert lines[-1] == "[2/3] running fsdp2_no_reshard recompute, micro batch 1, 2, 4, 8, 16"
    assert len(lines) == 6
