"""The fork server itself, of ranks that train nothing: for `test_fork_server.py`.

What a rank does with a rung is in its micro batch: `WELL` is answered at once, `WAITS` when the
launch's folder holds `GO`, and at `DIES` the rank ends by itself.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import NoReturn

from autotune.runner import server
from autotune.runner.answer import Answer, die_with_parent
from autotune.trial.protocol import (
    AccumulationResult,
    Outcome,
    Request,
    Rung,
    RungOrder,
    RungResult,
    read_message,
    rung_file,
)

WELL, WAITS, DIES = 1, 2, 3
GO = "go"


def run_small_rank(request_file: Path) -> NoReturn:
    die_with_parent()
    request = read_message(Request, request_file)
    answer = Answer(request)
    for rung in orders(answer.folder) if request.converses else request.rungs:
        answer.heartbeat()
        if rung.micro_batch_size == DIES:
            os._exit(3)
        while rung.micro_batch_size == WAITS and not (answer.folder / GO).exists():
            time.sleep(0.01)
        answer.first_step()
        steps = AccumulationResult(
            grad_accum_steps=rung.grad_accum_steps,
            step_s=[0.5, 0.5, 0.5],
            micro_step_s=[],
            sync_micro_step_s=[0.5] * 3,
            optimizer_step_s=[0.1] * 3,
            valid_tokens=[64] * 3,
            mean_step_tokens=64,
            peak_allocated_bytes=1,
            peak_reserved_bytes=1,
        )
        answer.add_rung(
            RungResult(
                micro_batch_size=rung.micro_batch_size, outcome=Outcome.OK, accumulations=[steps]
            )
        )
    answer.finish()
    os._exit(0)


def orders(folder: Path) -> Iterator[Rung]:
    for number in count(1):
        path = folder / rung_file(number)
        while not path.exists():
            time.sleep(0.01)
        rung = read_message(RungOrder, path).rung
        if rung is None:
            return
        yield rung


if __name__ == "__main__":
    server.run_rank = run_small_rank
    channel = socket.socket(fileno=int(sys.argv[1]))
    if os.environ.get("AUTOTUNE_PARENT_PID"):
        die_with_parent()
    server.Server(channel).serve()
