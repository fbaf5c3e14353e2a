"""Helpers of the configuration tests: a small base file, and the message of a refusal."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from autotune.config import RunConfig, load_config
from autotune.errors import AutotuneError

BASE = """
base_model: tiny-qwen3
learning_rate: 2e-5
micro_batch_size: 2
gradient_accumulation_steps: 4
"""
FSDP2 = "fsdp_version: 2\nfsdp_config:\n  reshard_after_forward: true\n"
Load = Callable[..., RunConfig]


def loader(folder: Path) -> Load:
    """Return a function that writes a base and more lines into a file of `folder` and reads it."""

    def load(extra: str = "", base: str = BASE) -> RunConfig:
        path = folder / "config.yml"
        path.write_text(base + textwrap.dedent(extra))
        return load_config(path)

    return load


def refusal(load: Load, extra: str, base: str = BASE) -> str:
    with pytest.raises(AutotuneError) as error:
        load(extra, base)
    assert error.value.exit_code == 2
    return str(error.value)
