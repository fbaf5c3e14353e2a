"""Data files of known models and GPUs; each number names its source."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import yaml

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_catalogue(name: str) -> dict[str, dict[str, Any]]:
    """Return the entries of ``<name>.yaml`` by their name."""
    text = (files(__name__) / f"{name}.yaml").read_text(encoding="utf-8")
    entries: dict[str, dict[str, Any]] = yaml.load(text, Loader=_LOADER)
    return entries
