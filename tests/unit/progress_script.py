"""A scripted search on this process's own terminal, for `test_progress_terminal.py`.

It stands still where the test looks, until a byte comes over the pipe whose number is the argument.
"""

from __future__ import annotations

import os
import sys

from autotune.report.console import LiveProgress
from tests.unit.report_studies import make_failure, make_plan, make_record


class Clock:
    """Seconds, moved by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def main(pipe: int) -> None:
    clock = Clock()
    progress = LiveProgress(clock=clock)
    progress.start(3, 600.0)
    progress.launch_started(1, "zero2 cp=2, micro batch 1, 2, 4, 8")
    clock.now += 30
    progress.rung_done(make_record(make_plan("zero2", 4), step_s=2.0))
    progress.rung_done(make_failure(make_plan("zero2", 8)))
    progress.launch_done(1)
    progress.note("Study in study: tiny-qwen3 on 2 x cpu ranks, sequence 256, global batch 8")
    progress.launch_started(2, "fsdp2_no_reshard recompute, micro batch 1, 2, 4, 8, 16")
    clock.now += 65
    os.read(pipe, 1)
    progress.stop()


if __name__ == "__main__":
    main(int(sys.argv[1]))
