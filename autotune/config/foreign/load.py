"""`load_any`: a configuration of any tool whose format is known here, into a `RunConfig`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autotune.config.foreign.accelerate_yaml import translate_accelerate
from autotune.config.foreign.deepspeed_json import translate_deepspeed
from autotune.config.foreign.recognise import FileKind, recognise
from autotune.config.foreign.translated import Translated
from autotune.config.keys import AUTOTUNE_KEY
from autotune.config.layout import RING_FUNCTIONS
from autotune.config.reading import read_json_mapping, read_text, read_yaml_mapping
from autotune.config.run import RunConfig, read_config
from autotune.errors import AutotuneError
from autotune.plan import CpBackend
from autotune.spec.model import load_model
from autotune.spec.training import TrainSettings

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class StartingPoint:
    """What a person says beside the file; None leaves it to the file."""

    model: str | None = None
    num_gpus: int | None = None
    sequence_len: int | None = None
    micro_batch_size: int | None = None
    grad_accum_steps: int | None = None
    gradient_checkpointing: bool | None = None
    sequence_parallel_by: CpBackend | None = None

    def keys(self) -> dict[str, Any]:
        """Return what is said, as keys that go over the file's."""
        said = {
            "base_model": self.model,
            "sequence_len": self.sequence_len,
            "micro_batch_size": self.micro_batch_size,
            "gradient_accumulation_steps": self.grad_accum_steps,
            "gradient_checkpointing": self.gradient_checkpointing,
        }
        return {key: value for key, value in said.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A configuration, and what it was read from."""

    kind: FileKind
    config: RunConfig
    num_gpus: int | None
    """Ranks asked for, or else those the file names."""
    keys: Mapping[str, Any] = field(repr=False)
    """The Axolotl keys it was read as."""
    warnings: tuple[str, ...] = ()
    """Of the translation; those of the keys are in `config.warnings`."""


def load_any(path: Path, start: StartingPoint | None = None, *, any_family: bool = False) -> Loaded:
    """Read an Axolotl, accelerate or DeepSpeed configuration; the content tells which.

    Warnings go to the log `autotune`, once.

    Args:
        path: The file, YAML or JSON.
        start: What the file leaves open or is to be read with. An accelerate or DeepSpeed file
            names no model, so it needs one.
        any_family: Whether a model will do whose family was not checked in training.

    Raises:
        AutotuneError: a file that cannot be read, of no known kind, or with a value that is not
            allowed; no model.
    """
    start = start or StartingPoint()
    where = str(path)
    values = _read(path)
    kind = recognise(values, where)
    if kind is FileKind.AXOLOTL:
        return _axolotl(path, values, start, any_family=any_family)
    if start.model is None:
        raise AutotuneError(
            f"{where}: this {kind} configuration names no model. Give it with --model."
        )
    hidden_size = load_model(start.model, any_family=any_family).hidden_size
    if kind is FileKind.ACCELERATE:
        found = translate_accelerate(
            values, path.parent, where, hidden_size=hidden_size, num_gpus=start.num_gpus
        )
    else:
        found = translate_deepspeed(values, where, hidden_size=hidden_size, num_gpus=start.num_gpus)
    keys = found.keys | start.keys()
    _state_what_is_open(found, keys, where, kind)
    _split_sequences_by(start.sequence_parallel_by, keys, where)
    block = {"num_gpus": found.num_gpus, "device": found.device}
    keys["autotune"] = {key: value for key, value in block.items() if value is not None}
    if found.warnings:
        _LOG.warning("%s", "\n".join(found.warnings))
    config = read_config(keys, path, any_family=any_family)
    _check_split(start.sequence_parallel_by, config, where)
    return Loaded(
        kind=kind,
        config=config,
        num_gpus=found.num_gpus,
        keys=keys,
        warnings=tuple(found.warnings),
    )


def _axolotl(
    path: Path, values: dict[str, Any], start: StartingPoint, *, any_family: bool
) -> Loaded:
    keys = values | start.keys()
    block = keys.get(AUTOTUNE_KEY) or {}
    if start.num_gpus is not None and isinstance(block, dict):
        keys[AUTOTUNE_KEY] = block | {"num_gpus": start.num_gpus}
    _split_sequences_by(start.sequence_parallel_by, keys, str(path))
    config = read_config(keys, path, any_family=any_family)
    _check_split(start.sequence_parallel_by, config, str(path))
    num_gpus = start.num_gpus or config.num_gpus
    if start.num_gpus is not None:
        config.plan(start.num_gpus)  # refuses ranks that the file cannot be laid out over
    return Loaded(kind=FileKind.AXOLOTL, config=config, num_gpus=num_gpus, keys=keys)


def _read(path: Path) -> dict[str, Any]:
    """Read JSON by its first character: YAML takes most of it too, but not 1e8 as a number."""
    if read_text(path).lstrip().startswith("{"):
        return read_json_mapping(path)
    return read_yaml_mapping(path)


def _state_what_is_open(
    found: Translated, keys: dict[str, Any], where: str, kind: FileKind
) -> None:
    """Fill in what the reading needs and name every such key."""
    filled = {
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": bool(
            keys.get("fsdp_config", {}).get("activation_checkpointing", False)
        ),
        "sequence_len": 2048,
        "sample_packing": False,
        "learning_rate": TrainSettings().learning_rate,
    }
    missing = {key: value for key, value in filled.items() if key not in keys}
    stated = keys.get("fsdp_config", {}).get("activation_checkpointing")
    keys |= missing
    if stated is not None:
        missing.pop("gradient_checkpointing", None)
    if missing:
        said = ", ".join(f"{key}: {str(value).lower()}" for key, value in missing.items())
        found.warnings.append(f"{where}: {kind} does not say, assumed: {said}.")


def _split_sequences_by(backend: CpBackend | None, keys: dict[str, Any], where: str) -> None:
    """Write what was said of the split into the keys, over what they say."""
    if backend is None:
        return
    degrees = (keys.get(key) for key in ("context_parallel_size", "sequence_parallel_degree"))
    if all(degree in (None, 1) for degree in degrees):
        raise AutotuneError(
            f"--sequence-parallel-by {backend}: {where} splits no sequences. Leave the flag out, "
            "or give the file a sequence-parallel degree."
        )
    if backend is CpBackend.RING:
        keys["ring_attn_func"] = RING_FUNCTIONS[bool(keys.get("sample_packing"))]
    else:
        for key in ("ring_attn_func", "heads_k_stride"):
            keys.pop(key, None)


def _check_split(backend: CpBackend | None, config: RunConfig, where: str) -> None:
    """Refuse Ulysses for heads it cannot split: without the flag such a file is the ring's.

    Raises:
        AutotuneError: it was asked for, and the heads are not enough.
    """
    layout = config.layout
    if backend is CpBackend.ULYSSES and layout.cp > 1 and layout.cp_backend is not backend:
        raise AutotuneError(
            f"--sequence-parallel-by {backend}: {where} splits sequences over {layout.cp}, which "
            f"does not divide the heads of {config.model.name}. Use ring, or another degree."
        )
