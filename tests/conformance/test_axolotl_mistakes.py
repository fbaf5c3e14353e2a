"""Every known key, misspelt at every level, is answered with itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import yaml

from autotune.config import load_config
from autotune.config.keys import key_catalogue
from autotune.errors import AutotuneError

CATALOGUE = key_catalogue()
BASE = {"base_model": "tiny-qwen3", "learning_rate": 1e-4}
PLACES: dict[str, tuple[frozenset[str], Callable[[str], dict[str, Any]]]] = {
    "top": (CATALOGUE.top_level, lambda key: {key: 1}),
    "fsdp_config": (
        CATALOGUE.fsdp_keys - {"fsdp_version"},  # its prefix counts, misspelt or not
        lambda key: {"fsdp_version": 2, "fsdp_config": {key: 1}},
    ),
    "dataset": (CATALOGUE.dataset_keys, lambda key: {"datasets": [{"path": "a", key: 1}]}),
    "deepspeed": (CATALOGUE.deepspeed_keys, lambda key: {"deepspeed": {key: 1}}),
    "zero": (
        CATALOGUE.zero_keys,
        lambda key: {"deepspeed": {"zero_optimization": {"stage": 2, key: 1}}},
    ),
    "offload": (
        CATALOGUE.offload_keys,
        lambda key: {
            "deepspeed": {"zero_optimization": {"stage": 2, "offload_optimizer": {key: 1}}}
        },
    ),
} | {
    name: (keys, lambda key, name=name: {name: {key: 1}})
    for name, keys in CATALOGUE.nested_keys.items()
} | {
    f"deepspeed-{name}": (keys, lambda key, name=name: {"deepspeed": {name: {key: 1}}})
    for name, keys in CATALOGUE.deepspeed_sections.items()
}  # fmt: skip
EVERY = 5
"""One key in so many at the top level, where to find the nearest takes longest."""


def misspelt(key: str) -> str:
    """Leave out a letter in the middle, and double the one after it."""
    middle = len(key) // 2
    return key[: middle - 1] + key[middle] * 2 + key[middle + 1 :]


def told(values: dict[str, Any], tmp_path) -> str:
    path = tmp_path / "config.yml"
    path.write_text(yaml.safe_dump(BASE | values))
    with pytest.raises(AutotuneError) as error:
        load_config(path)
    return str(error.value)


@pytest.mark.parametrize("place", PLACES)
def test_misspelt_keys(place, tmp_path):
    known, values = PLACES[place]
    chosen = sorted(key for key in known if len(key) > 5)[:: EVERY if place == "top" else 1]
    missed = {}
    for key in chosen:
        wrong = misspelt(key)
        if wrong not in known:
            message = told(values(wrong), tmp_path)
            assert f"unknown key `{wrong}`" in message
            if f"Nearest: {key}. " not in message:
                missed[wrong] = message
    # Keys a letter apart from one another may be answered with a neighbour.
    assert len(missed) <= len(chosen) // 20, missed
