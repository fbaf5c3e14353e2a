"""Train; after out-of-memory go on a rung further down, from the last checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from autotune.ladder.record import LADDER_FILE, Descent
from autotune.ladder.rungs import Ladder
from autotune.plan import Plan
from autotune.training import Trained, TrainLog, train, write_run_file
from autotune.trial.checkpoint import IDENTITY_FILE, checkpoints_of, is_whole, step_of
from autotune.trial.protocol import LOG_FILE, Outcome, Phase, Request
from autotune.trial.ranks import Starter
from autotune.trial.run_log import cut_log

_WHERE = {
    Phase.LOAD: " while it loaded",
    Phase.STEP: "",
    Phase.EVALUATE: " in evaluation",
    Phase.SAVE: " while it saved",
}


def train_down(
    request: Request,
    ladder: Ladder | None,
    stream: TextIO,
    starter: Starter | None = None,
    *,
    descent: Descent | None = None,
    run: Callable[[Request, TrainLog, Starter | None], Trained] = train,
) -> Trained:
    """Train; after each out-of-memory go a rung down and on from the last checkpoint.

    Args:
        request: Of the run.
        ladder: Where to go; None stops at the first out-of-memory.
        stream: Where the log is shown.
        starter: As in `autotune.training.train`.
        descent: How the request came to differ from the file, where it does.
        run: What trains.
    """
    older = _later_checkpoints(request)
    out_dir = Path(request.out_dir)
    if descent is None:
        descent = Descent(own=request.plan_object())
        assert request.train is not None
        # What lies here is of another plan, or of a run begun anew.
        if ladder is not None or request.train.resume_from is None:
            (out_dir / LADDER_FILE).unlink(missing_ok=True)
    else:
        descent.write(out_dir)  # the checkpoint may be of a run in another folder
    while True:
        assert request.train is not None
        resumed = request.train.resume_from
        log = TrainLog(out_dir, stream, step_of(Path(resumed)) if resumed else None)
        log.announce(request)
        ended = run(request, log, starter)
        ended.document["ladder"] = descent.steps
        write_run_file(out_dir, ended.document)
        if ladder is None or not _out_of_memory(ended, request):
            return ended
        failed, phase = request.plan_object(), Phase(ended.document.get("stopped_in", Phase.STEP))
        step = ladder.next(failed, phase, _eval_batch_size(request))
        if step is None:
            if phase in (Phase.LOAD, Phase.STEP):
                return replace(ended, advice=ladder.beyond(failed, phase))
            return ended
        descent.take(step, out_dir)
        request = lowered(request, step.plan, older, step.eval_batch_size)
        said = f"Out of memory{_WHERE[phase]}. Next: {step.words()}; {_from_where(request)}.\n"
        stream.write(said)


def lowered(
    request: Request,
    plan: Plan,
    older: Mapping[Path, int] | None = None,
    eval_batch_size: int | None = None,
) -> Request:
    """Return the request of a rung below: from the last whole checkpoint, if there is one.

    Without one the run starts again, and the log of the steps before is set aside.

    Args:
        request: Of the run that ran out of memory.
        plan: Of the rung.
        older: What `_later_checkpoints` found before the run.
        eval_batch_size: Of the rung, where evaluation ran out.
    """
    assert request.train is not None
    out_dir = Path(request.out_dir)
    still_there = {path for path, time in (older or {}).items() if _written_at(path) == time}
    whole = [p.resolve() for _, p in checkpoints_of(out_dir) if is_whole(p)]
    own = [path for path in whole if path not in still_there]
    checkpoint = str(own[-1]) if own else request.train.resume_from or ""
    if not checkpoint:
        cut_log(out_dir / LOG_FILE, -1)
    changes: dict[str, Any] = {"resume_from": checkpoint or None}
    if eval_batch_size is not None:
        changes["eval_batch_size"] = eval_batch_size
    elif request.train.eval_batch_size is not None:
        size = min(request.train.eval_batch_size, plan.micro_batch_size)
        changes["eval_batch_size"] = size
    settings = request.train.model_copy(update=changes)
    return request.model_copy(update={"plan": plan.to_dict(), "train": settings})


def _eval_batch_size(request: Request) -> int:
    assert request.train is not None
    return request.train.eval_batch_size or request.plan_object().micro_batch_size


def _later_checkpoints(request: Request) -> dict[Path, int]:
    """Return the checkpoints after the one the user goes on from, and when they were written.

    The ranks set them aside at the first step; out of memory before it, they are still there, and
    the run would go on from what was to be trained anew.
    """
    assert request.train is not None
    if request.train.resume_from is None:
        return {}
    step = step_of(Path(request.train.resume_from))
    found = checkpoints_of(Path(request.out_dir))
    return {path.resolve(): _written_at(path) for later, path in found if later > step}


def _written_at(checkpoint: Path) -> int:
    """Return the time its last file was written, in ns; 0 where it is not whole or not there."""
    file = checkpoint / IDENTITY_FILE
    return file.stat().st_mtime_ns if file.is_file() else 0


def _from_where(request: Request) -> str:
    assert request.train is not None
    if request.train.resume_from is None:
        return "there is no checkpoint yet, so it starts again"
    return f"it goes on from {Path(request.train.resume_from).name}"


def _out_of_memory(ended: Trained, request: Request) -> bool:
    outcome = ended.document.get("outcome")
    # On CPU ranks the device is the host: what the kernel kills there is the ranks' own.
    host = outcome == Outcome.HOST_OOM and request.device == "cpu"
    return outcome == Outcome.OOM or host
