"""Which rung a run had reached, kept in its folder so that `--resume` goes on there.

An interrupt in the middle of the ladder would otherwise be followed by a start at the file's own
micro batch, which is known to run out.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from autotune.errors import AutotuneError
from autotune.ladder.rungs import Step
from autotune.plan import Plan
from autotune.trial.protocol import Request

LADDER_FILE = "ladder.json"


@dataclass(kw_only=True)
class Descent:
    """From the file's own plan down to the present one."""

    own: Plan
    """What the file asks for."""
    steps: list[dict[str, Any]] = field(default_factory=list)
    """`Step.to_dict()` of each, this run's and those of the runs it goes on with."""

    def take(self, step: Step, run: Path) -> None:
        """Note a step, on disk before the run goes on at it."""
        self.steps.append(step.to_dict())
        self.write(run)

    def write(self, run: Path) -> None:
        """Keep it in a run's folder."""
        run.mkdir(parents=True, exist_ok=True)
        temporary = run / f".{LADDER_FILE}.tmp"
        document = {"own": self.own.to_dict(), "steps": self.steps}
        temporary.write_text(json.dumps(document, indent=1) + "\n")
        os.replace(temporary, run / LADDER_FILE)

    def words(self) -> str:
        """Say what differs from the file."""
        changes = "; ".join(step["change"] for step in self.steps)
        return f"the rung it had reached, not at the file's own {self.own.describe()}: {changes}"


def at_recorded_rung(request: Request) -> tuple[Request, Descent | None]:
    """Return the request at the rung its checkpoint's run had reached, and how that came.

    A run that goes on from no checkpoint, was never on a rung, or had another plan in its file,
    stays what it is, and there is no descent.

    Raises:
        AutotuneError: the record cannot be read.
    """
    assert request.train is not None
    if request.train.resume_from is None:
        return request, None
    file = Path(request.train.resume_from).parent / LADDER_FILE
    if not file.is_file():
        return request, None
    try:
        document = json.loads(file.read_text())
        descent = Descent(own=Plan.from_dict(document["own"]), steps=list(document["steps"]))
        plan = Plan.from_dict(descent.steps[-1]["plan"])
        sizes = [step["eval_batch_size"] for step in descent.steps if "eval_batch_size" in step]
        descent.words()
        _check_rung(descent.own, plan, sizes)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise AutotuneError(
            f"{file} cannot be read ({type(error).__name__}: {error}). It says which rung the run "
            "had reached: remove it to go on with the file's own micro batch."
        ) from None
    if descent.own != request.plan_object():
        return request, None
    own = request.train.eval_batch_size
    sizes += [] if own is None else [min(own, plan.micro_batch_size)]
    settings = request.train.model_copy(update={"eval_batch_size": min(sizes, default=None)})
    return request.model_copy(update={"plan": plan.to_dict(), "train": settings}), descent


# What a rung changes; `autotune.ladder.rungs` makes no others.
_OF_A_RUNG = ("micro_batch_size", "grad_accum_steps", "recompute", "strategy", "offload_optimizer",
              "offload_params")  # fmt: skip


def _check_rung(own: Plan, plan: Plan, eval_sizes: list[Any]) -> None:
    """Refuse what no descent from `own` comes to: it would be launched, or divided by.

    Raises:
        ValueError: says what is wrong.
    """
    counts = [plan.micro_batch_size, plan.grad_accum_steps, *eval_sizes]
    wrong = [count for count in counts if type(count) is not int or count < 1]
    if wrong:
        raise ValueError(f"{wrong[0]!r} where a whole number above 0 belongs")
    kept = replace(plan, **{name: getattr(own, name) for name in _OF_A_RUNG})
    if kept != own:
        raise ValueError("its engine or layout is not the run's")
    if plan.micro_batch_size * plan.grad_accum_steps != own.micro_batch_size * own.grad_accum_steps:
        raise ValueError("its global batch is not the run's")
