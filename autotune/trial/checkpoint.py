"""A checkpoint as a whole: where it ends, and which run alone can go on from it."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autotune.errors import AutotuneError
from autotune.spec.model import NAMES_AND_PLACES, model_from_config
from autotune.trial.protocol import Request

IDENTITY_FILE = "autotune_checkpoint.json"
"""Written when every rank has written its part: a checkpoint without it is not whole."""
_STATE_FILE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_DATA_KEYS = ("global_batch_size", "data", "seed")


def identity_of(request: Request, data_digest: str | None) -> dict[str, Any]:
    """Return what a run must have in common with the one that wrote a checkpoint.

    The model comes as its sizes, each under its own name, so that a message can say which differs.

    Args:
        request: Of the run.
        data_digest: Of its sequences; None where they were not read: then they are not compared.
    """
    plan, workload = request.plan_object(), request.workload
    model = model_from_config(request.model.name, request.model.config)
    sizes = model.model_dump(mode="json", exclude=NAMES_AND_PLACES, exclude_defaults=True)
    return sizes | {
        "adapter": workload.adapter.model_dump(mode="json") if workload.adapter else None,
        "engine": str(plan.engine),
        "zero_stage": plan.zero_stage,
        "ranks": plan.world_size,
        "sequence_parallel": plan.cp,
        **({"tensor_parallel": plan.tp} if plan.tp > 1 else {}),
        **{name: True for name in ("fp8", "fp8_all_gather") if getattr(workload, name)},
        "optimizer": workload.optimizer,
        "precision": str(workload.precision),
        "global_batch_size": plan.global_batch_size,
        "seed": request.seed,
        **({} if data_digest is None else {"data": data_digest}),
    }


def write_identity(checkpoint: Path, identity: Mapping[str, Any]) -> None:
    """Declare a checkpoint whole; to be called when every rank has written its part."""
    temporary = checkpoint / f".{IDENTITY_FILE}.tmp"
    temporary.write_text(json.dumps(identity, indent=1) + "\n")
    os.replace(temporary, checkpoint / IDENTITY_FILE)


def is_whole(checkpoint: Path) -> bool:
    """Say whether every rank had written its part of a checkpoint."""
    return all((checkpoint / name).is_file() for name in (_STATE_FILE, IDENTITY_FILE))


def check_whole(checkpoint: Path) -> None:
    """Refuse what is no checkpoint, or not a whole one.

    Raises:
        AutotuneError: it is one of those.
    """
    if not is_whole(checkpoint):
        raise AutotuneError(
            f"{checkpoint} is not a checkpoint of `autotune train`, or its writing was cut short: "
            f"{_STATE_FILE} and {IDENTITY_FILE} are needed. Give another, or train anew."
        )


def check_identity(checkpoint: Path, identity: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that a run cannot go on from exactly.

    Raises:
        AutotuneError: it is not whole, or of another run.
    """
    check_whole(checkpoint)
    held = _read(checkpoint / IDENTITY_FILE)
    compared = {*held, *identity} - ({"data"} - {*identity})
    differ = [key for key in sorted(compared) if held.get(key) != identity.get(key)]
    if not differ:
        return
    shown = "; ".join(f"{key} {held.get(key)} there, {identity.get(key)} here" for key in differ)
    if set(differ) <= set(_DATA_KEYS):
        why = (
            "it would skip some of the data and repeat some. Keep micro_batch_size x "
            "gradient_accumulation_steps x data-parallel ranks, the data and the seed"
        )
    else:
        why = (
            "its weights and optimizer states do not fit. Keep the model, the engine, the "
            "optimizer and the number of ranks"
        )
    raise AutotuneError(f"{checkpoint} is of another run ({shown}); {why}.")


def checkpoints_of(run: Path) -> list[tuple[int, Path]]:
    """Return the steps and folders of a run's checkpoints, whole or not, in the steps' order."""
    if not run.is_dir():
        return []
    named = [(_NAME.fullmatch(path.name), path) for path in run.iterdir()]
    return sorted((int(match[1]), path) for match, path in named if match)


def set_aside_later(run: Path, step: int) -> None:
    """Rename the checkpoints after a step that a run goes on from: those steps run again.

    Else a later `--resume` could take one of them, and one that is being written over would look
    whole. The new name is none that the Trainer counts among its checkpoints, or deletes.
    """
    for later, path in checkpoints_of(run):
        if later > step:
            ends = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
            names = (run / f"cut-{path.name}{end}" for end in ends)
            path.rename(next(new for new in names if not new.exists()))


def step_of(checkpoint: Path) -> int:
    """Return the optimizer step a checkpoint ends at.

    Raises:
        AutotuneError: its state cannot be read.
    """
    step = _read(checkpoint / _STATE_FILE).get("global_step")
    if not isinstance(step, int):
        raise AutotuneError(f"{checkpoint / _STATE_FILE} states no global_step. Give another.")
    return step


def _read(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise AutotuneError(f"{file} cannot be read: {error}. Give another checkpoint.") from None
    if not isinstance(values, dict):
        raise AutotuneError(f"{file} holds no JSON object. Give another checkpoint.")
    return values
