"""One rank of a sweep: ``python -m autotune.runner.sweep SWEEP.json`` with RANK set.

The rates come first, then the model's own passes, then the engines. On CPU ranks every part is a
fork of a process that has imported the training stack once, with a process group of its own: the
engines leave global state behind, and importing takes longer than measuring.
"""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from autotune.calibrate.spec import SweepAnswer, SweepSpec, answer_file
from autotune.errors import AutotuneError
from autotune.runner.answer import die_with_parent
from autotune.trial.protocol import read_message, write_message

Part = Callable[[SweepSpec, SweepAnswer], None]
_REFUSALS = (AutotuneError, ImportError, MemoryError, OSError, RuntimeError, ValueError)
"""How a library or the machine says that a part cannot be measured; anything else is a bug here."""


def main() -> None:
    """Measure every part and leave an answer file for each."""
    die_with_parent()
    spec = read_message(SweepSpec, Path(sys.argv[1]))
    import torch  # with what follows before the forks, so once

    if spec.model is not None:
        import accelerate  # noqa: F401
        import transformers  # noqa: F401

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    forks = spec.device == "cpu"
    if forks and spec.strategies:
        import deepspeed  # noqa: F401

        import autotune.runner.trial  # noqa: F401
    for name, part in _parts(spec):
        os.environ["MASTER_PORT"] = str(_meeting_port(Path(spec.folder) / f"port-{name}"))
        if forks:
            _in_fork(spec, name, part)
        else:
            _answer(spec, name, part)
    sys.stdout.flush()
    os._exit(0)


def _meeting_port(file: Path) -> int:
    """Return the port of a part's process group: the first rank picks it when the part begins.

    Picked at the start of the sweep, another program could have taken it meanwhile.
    """
    if os.environ["RANK"] == "0":
        with socket.socket() as free:
            free.bind(("", 0))
            port = int(free.getsockname()[1])
        temporary = file.with_suffix(".tmp")
        temporary.write_text(str(port))
        temporary.rename(file)
        return port
    while not file.exists():  # the supervisor ends a rank that waits in vain
        time.sleep(0.01)
    return int(file.read_text())


def _parts(spec: SweepSpec) -> list[tuple[str, Part]]:
    from autotune.runner.sweep_engines import engine_part
    from autotune.runner.sweep_passes import measure_passes
    from autotune.runner.sweep_rates import measure_rates

    parts: list[tuple[str, Part]] = [("rates", measure_rates)]
    if spec.model is not None:
        parts.append(("passes", measure_passes))
        # Engines need processes of their own, and only where nothing overlaps do they add up.
        if spec.device == "cpu":
            deepest = max(spec.model.depths)
            parts += [
                (f"engine-{number}", engine_part(number, deepest))
                for number in range(len(spec.strategies))
            ]
    return parts


def _in_fork(spec: SweepSpec, name: str, part: Part) -> None:
    os.environ["AUTOTUNE_PARENT_PID"] = str(os.getpid())
    child = os.fork()
    if child == 0:
        code = 1
        try:
            die_with_parent()
            _answer(spec, name, part)
            code = 0
        finally:
            if code:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if ended:
        note = f"{name}: its process ended with {ended}"
        _write(spec, name, SweepAnswer(rank=_rank(), notes=[note]))


def _answer(spec: SweepSpec, name: str, part: Part) -> None:
    answer = SweepAnswer(rank=_rank())
    try:
        part(spec, answer)
    except _REFUSALS as error:  # one part that cannot be measured must not cost the others
        traceback.print_exc()
        answer.notes.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
    _write(spec, name, answer)


def _write(spec: SweepSpec, name: str, answer: SweepAnswer) -> None:
    write_message(answer, Path(spec.folder) / answer_file(answer.rank, name))


def _rank() -> int:
    return int(os.environ["RANK"])


if __name__ == "__main__":
    main()
