"""One rank, from its request to its exit code; the same whether it was started cold or forked."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

from autotune.errors import AutotuneError
from autotune.runner.answer import Answer, die_with_parent
from autotune.trial.protocol import Outcome, Request, read_message


def run_rank(request_file: Path) -> NoReturn:
    """Run the request; leave a complete result file whatever happens.

    The process ends with `os._exit`: by then everything is written, and DeepSpeed sometimes aborts
    in its own destructors after a run that finished well.
    """
    die_with_parent()
    request = read_message(Request, request_file)
    answer = Answer(request)
    code = 1
    try:
        _run(request, answer)
        answer.finish()
        code = 0
    except AutotuneError as error:
        answer.fail(error, Outcome.CRASHED)
    except BaseException as error:  # the process edge; a failed checkpoint load is no Exception
        from autotune.runner.checks import InvalidRunError
        from autotune.runner.gauges import make_gauge, memory_outcome

        invalid = Outcome.INVALID if isinstance(error, InvalidRunError) else None
        # On a GPU, host memory that ran out is no reason to train with smaller micro batches.
        gauge = make_gauge(request.device)
        answer.fail(error, invalid or memory_outcome(error, gauge) or Outcome.CRASHED)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run(request: Request, answer: Answer) -> None:
    if request.mode == "trial":
        from autotune.runner.trial import run_trial

        run_trial(request, answer)
    else:
        from autotune.runner.train import run_training

        run_training(request, answer)
