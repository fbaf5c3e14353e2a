"""Find the data folders that ship with the package."""

from __future__ import annotations

import os
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parent.parent


def data_dir(name: str) -> Traversable:
    """Return a data folder, from the wheel or, in a checkout, from beside the package."""
    checkout = _CHECKOUT / name
    if checkout.is_dir() and (_CHECKOUT / "pyproject.toml").is_file():
        return checkout
    shipped = files("autotune") / "_data" / name
    if shipped.is_dir():
        return shipped
    raise FileNotFoundError(
        f"autotune data folder {name!r} is missing: looked in {shipped} and {checkout}"
    )


def cache_dir() -> Path:
    """Return the folder for built native operators and knowledge of this machine.

    ``AUTOTUNE_CACHE_DIR`` moves it; else ``$XDG_CACHE_HOME/autotune`` or ``~/.cache/autotune``.
    """
    own = os.environ.get("AUTOTUNE_CACHE_DIR")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "autotune"
