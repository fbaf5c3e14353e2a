"""Whose configuration a file is, told from its keys."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from autotune.errors import AutotuneError


class FileKind(StrEnum):
    """The tool a file configures."""

    AXOLOTL = "Axolotl"
    ACCELERATE = "accelerate"
    DEEPSPEED = "DeepSpeed"


# The first row with a key in the file decides. An Axolotl file may hold a DeepSpeed mapping, and an
# accelerate file may too, but neither holds the other's keys at its top level.
_MARKS: tuple[tuple[FileKind, frozenset[str]], ...] = (
    (FileKind.AXOLOTL, frozenset({"base_model"})),
    (FileKind.ACCELERATE, frozenset({"compute_environment", "distributed_type"})),
    (
        FileKind.DEEPSPEED,
        frozenset(
            {"zero_optimization", "train_micro_batch_size_per_gpu", "train_batch_size"}
        ),
    ),
    (
        FileKind.AXOLOTL,
        frozenset({"micro_batch_size", "sequence_len", "deepspeed", "fsdp_config", "fsdp",
                   "datasets", "adapter"}),
    ),
)  # fmt: skip


def recognise(values: Mapping[str, Any], where: str) -> FileKind:
    """Return the tool whose keys stand at the top level.

    Raises:
        AutotuneError: no key that tells.
    """
    for kind, marks in _MARKS:
        if marks & values.keys():
            return kind
    named = ", ".join(sorted(map(str, values))[:5]) or "none"
    raise AutotuneError(
        f"{where}: this is no configuration that is read here; its first keys: {named}. Known: "
        "Axolotl YAML (base_model), accelerate's config file (distributed_type), DeepSpeed JSON "
        "(zero_optimization)."
    )
