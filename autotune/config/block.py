"""`AutotuneBlock`: what `best.yml` tells about the search that wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from autotune.config.keys import AUTOTUNE_KEY, check_known
from autotune.errors import AutotuneError
from autotune.plan import Plan, Recompute


class LadderRung(BaseModel):
    """A configuration that needs less memory, at the same global batch."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    micro_batch_size: int = Field(ge=1)
    gradient_accumulation_steps: int = Field(ge=1)
    gradient_checkpointing: bool = False


class AutotuneBlock(BaseModel):
    """The block `autotune:` of a configuration. Nothing in it decides how the run is sharded."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: str | None = None
    """Version of this tool that wrote the file."""
    num_gpus: int | None = Field(default=None, ge=1, le=10**6)
    """Ranks the search measured on; `train` starts as many unless told otherwise."""
    device: str | None = None
    hardware: dict[str, Any] = Field(default_factory=dict)
    """Fingerprint of the machine that was measured."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Of the libraries the search measured with."""
    plan_id: str | None = None
    """Id of the measured plan; it differs from the file's own plan once the file was edited."""
    measured: dict[str, Any] = Field(default_factory=dict)
    ladder: tuple[LadderRung, ...] = ()
    """Where `train` goes, in order, when the run meets OOM; see `autotune.ladder`."""


def read_block(values: object, where: str) -> AutotuneBlock:
    """Read the block `autotune:`; an absent one is empty.

    Raises:
        AutotuneError: an unknown field, or one of the wrong kind.
    """
    if isinstance(values, Mapping):
        check_known(values, AutotuneBlock.model_fields, f"{where}: {AUTOTUNE_KEY}")
    try:
        return AutotuneBlock.model_validate({} if values is None else values)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise AutotuneError(
            f"{where}: autotune{'.' if key else ''}{key}: {problem['msg']}. Correct it, or remove "
            "the block: a run does not need it."
        ) from None


def fallback_ladder(plan: Plan) -> list[LadderRung]:
    """Return the rungs below a plan: smaller micro batches, at the end one with recompute.

    Every rung keeps ``micro_batch_size * grad_accum_steps``, hence the global batch, and the
    engine, so that checkpoints still load. Recompute comes last and at the smallest micro batch,
    the only rung sure to need less memory than the one before it.
    """
    product = plan.micro_batch_size * plan.grad_accum_steps
    recompute = plan.recompute is Recompute.FULL
    rungs = [
        LadderRung(
            micro_batch_size=size,
            gradient_accumulation_steps=product // size,
            gradient_checkpointing=recompute,
        )
        for size in range(plan.micro_batch_size - 1, 0, -1)
        if product % size == 0
    ]
    if not recompute:
        rungs.append(
            LadderRung(
                micro_batch_size=1,
                gradient_accumulation_steps=product,
                gradient_checkpointing=True,
            )
        )
    return rungs
