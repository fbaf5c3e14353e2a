"""A trained adapter as a run left it: where its weights lie, and which base they belong to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from autotune.errors import AutotuneError
from autotune.trial.checkpoint import IDENTITY_FILE, checkpoints_of
from autotune.trial.folder import LAUNCHES, numbered_launches
from autotune.trial.protocol import REQUEST_FILE, Request, read_message

SAVED_CONFIG = "adapter_config.json"
SAVED_WEIGHTS = "adapter_model.safetensors"
DCP_FOLDER = "pytorch_model_fsdp_0"
"""FSDP2's sharded checkpoint, which has no `SAVED_CONFIG`."""


class MergeOrder(BaseModel):
    """What `autotune.runner.merge` is told."""

    model_config = ConfigDict(extra="forbid")

    adapter: str
    """Folder with `SAVED_WEIGHTS` or `DCP_FOLDER`."""
    base: str
    """Folder or Hub id of the weights the adapter goes on."""
    out: str
    """Empty folder to write into."""
    run: str | None = None
    """Folder of the run, for its tokenizer."""
    lora: dict[str, Any] | None = None
    """Of a sharded checkpoint: `Lora` as JSON."""


def merge_order(folder: Path, base: str | None, out: Path) -> MergeOrder:
    """Return the order to merge the adapter in `folder`.

    Args:
        folder: The output of a run, or one of its checkpoints.
        base: The weights it goes on; None takes those it was trained on.
        out: Folder to write into.

    Raises:
        AutotuneError: no adapter there, or none whose base is known.
    """
    if not folder.is_dir():
        raise AutotuneError(f"{folder} is no folder. Give the output of a run, or a checkpoint.")
    sharded = (folder / DCP_FOLDER).is_dir()
    if not sharded and not (folder / SAVED_WEIGHTS).is_file():
        raise AutotuneError(_nothing_there(folder))
    run = folder if (folder / LAUNCHES).is_dir() else folder.parent
    lora = None if (folder / SAVED_WEIGHTS).is_file() else _lora_of_checkpoint(folder)
    known = base or _base_of(folder, run)
    if known is None:
        raise AutotuneError(
            f"{folder} was trained on random weights, or does not say on which. Give the base by "
            "--base, a local folder or a Hub id."
        )
    return MergeOrder(adapter=str(folder), base=known, out=str(out), run=str(run), lora=lora)


def _nothing_there(folder: Path) -> str:
    held = [path.name for _, path in checkpoints_of(folder)]
    if held:
        return (
            f"{folder} holds no adapter of a finished run. Give one of its checkpoints: "
            f"{', '.join(held)}."
        )
    return (
        f"{folder} holds no adapter ({SAVED_WEIGHTS} or {DCP_FOLDER}). Give the output of "
        "`autotune train` with adapter: lora or qlora, or one of its checkpoints."
    )


def _lora_of_checkpoint(folder: Path) -> dict[str, Any]:
    file = folder / IDENTITY_FILE
    try:
        lora = json.loads(file.read_text()).get("adapter")
    except (OSError, ValueError, AttributeError) as error:
        raise AutotuneError(
            f"{folder} is not a whole checkpoint of `autotune train`: {IDENTITY_FILE} cannot be "
            f"read ({error}). Give another."
        ) from None
    if not isinstance(lora, dict):
        raise AutotuneError(
            f"{folder} is a checkpoint of all parameters, not of an adapter: there is nothing to "
            "merge. Train with adapter: lora, or use the final weights of that run."
        )
    return lora


def _base_of(folder: Path, run: Path) -> str | None:
    """Return the weights a run started from: as its request says, or as PEFT wrote them down."""
    for _, launch in reversed(numbered_launches(run / LAUNCHES)):
        weights = _weights_of(launch / REQUEST_FILE)
        if weights is not None:
            return weights
    weights = _weights_of(run / REQUEST_FILE)
    if weights is not None:
        return weights
    try:
        named = json.loads((folder / SAVED_CONFIG).read_text()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        return None
    return named or None


def _weights_of(request: Path) -> str | None:
    try:
        return read_message(Request, request).model.weights
    except (OSError, ValidationError):
        return None
