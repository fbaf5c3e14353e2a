"""`Strategy`: how model states are spread over ranks, read from ``strategies/*.yaml``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from enum import StrEnum
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from autotune.errors import AutotuneError, nearest
from autotune.plan import Engine
from autotune.resources import data_dir

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Replicate(StrEnum):
    """Which data-parallel ranks hold copies of the same model states."""

    NONE = "none"
    """States are sharded over all of them."""
    ALL = "all"
    """Every rank holds everything."""
    HYBRID = "hybrid"
    """Sharded inside a node and copied between nodes; on one node, two copies."""


class Strategy(BaseModel):
    """One file of ``strategies/``; the planner adds mesh, batches and recompute."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    summary: str
    engine: Engine
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed only, where it is 1 to 3."""
    reshard_after_forward: bool = True
    """FSDP2 only: free the gathered parameters between forward and backward."""
    offload_optimizer: bool = False
    """Keep optimizer states in host memory and step on the CPU."""
    offload_params: bool = False
    """Keep the sharded parameters in host memory."""
    replicate: Replicate = Replicate.NONE
    copies: int | None = Field(default=None, ge=2)
    """Of a hybrid: how many; None is one a node, and two on one node."""
    bucket_elements: int = Field(default=0, ge=0)
    """DeepSpeed only: its buckets, in elements; 0 means hidden squared."""
    hpz: int = Field(default=1, ge=1)
    """ZeRO-3 only: `zero_hpz_partition_size`, the ranks of a node; see `Plan.hpz`."""
    supports_sequence_parallel: bool = True
    supports_lora: bool = True


def load_strategies(names: Sequence[str] | None = None) -> list[Strategy]:
    """Read strategies by name or path, in the order given; None reads all that ship.

    Raises:
        AutotuneError: an unknown name, a missing or malformed file, a name given twice.
    """
    shipped = _shipped_files()
    if names is None:
        return [_read(file, label) for label, file in shipped.items()]
    if not names:
        raise AutotuneError(f"No strategy given. Known: {', '.join(shipped)}.")
    chosen = [_find(name, shipped) for name in names]
    seen: set[str] = set()
    for strategy in chosen:
        if strategy.name in seen:
            raise AutotuneError(f"Strategy {strategy.name!r} is given twice.")
        seen.add(strategy.name)
    return chosen


def _shipped_files() -> dict[str, Traversable]:
    files = sorted(data_dir("strategies").iterdir(), key=lambda file: file.name)
    return {f.name.removesuffix(".yaml"): f for f in files if f.name.endswith(".yaml")}


def _find(name: str, shipped: dict[str, Traversable]) -> Strategy:
    if name in shipped:
        return _read(shipped[name], name)
    if name.endswith((".yaml", ".yml")):
        path = Path(os.path.expanduser(name))  # Path's own raises where there is no such user
        if not path.is_file():
            raise AutotuneError(f"No strategy file {name!r}.")
        return _read(path, name)
    raise AutotuneError(
        f"Unknown strategy {name!r}.{nearest(name, shipped)} Known: {', '.join(shipped)}; "
        "or a path to a YAML file of your own."
    )


def _read(file: Traversable, label: str) -> Strategy:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise AutotuneError(f"Strategy file {label!r} cannot be read: {reason}.") from error
    try:
        values = yaml.load(text, Loader=_LOADER)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise AutotuneError(
            f"Strategy file {label!r}{where}: {getattr(error, 'problem', error)}."
        ) from error
    except ValueError as error:  # a date that does not exist
        raise AutotuneError(f"Strategy file {label!r}: {error}.") from error
    if not isinstance(values, dict):
        raise AutotuneError(f"Strategy file {label!r} must be a mapping of keys to values.")
    try:
        return Strategy.model_validate(values)
    except ValidationError as error:
        raise AutotuneError(f"Strategy file {label!r}: {_explain(error)}") from error


def _explain(error: ValidationError) -> str:
    parts = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        hint = nearest(key, Strategy.model_fields) if problem["type"] == "extra_forbidden" else ""
        parts.append(f"{key}: {problem['msg']}.{hint}")
    return " ".join(parts)
