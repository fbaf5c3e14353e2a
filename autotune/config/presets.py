"""`deepspeed:` of a configuration: a preset's name, a JSON file or the mapping itself."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autotune.config.reading import read_json_mapping
from autotune.config.values import shorten
from autotune.errors import AutotuneError
from autotune.resources import data_dir

PRESET_FOLDER = "deepspeed_configs"


def preset_names() -> list[str]:
    """Return the file names of the shipped DeepSpeed presets."""
    return sorted(entry.name for entry in data_dir(PRESET_FOLDER).iterdir()
                  if entry.name.endswith(".json"))  # fmt: skip


def preset_text(name: str) -> str:
    """Return a shipped preset as it stands in its file."""
    return (data_dir(PRESET_FOLDER) / name).read_text(encoding="utf-8")


def find_deepspeed(value: object, folder: Path, where: str) -> tuple[dict[str, Any], str]:
    """Return the DeepSpeed mapping that `deepspeed:` stands for, and what to call it in messages.

    A path is looked up from the working directory (as Axolotl does), then from the
    configuration's folder, then among the shipped presets by file name.

    Raises:
        AutotuneError: neither a mapping nor a file that exists.
    """
    if isinstance(value, Mapping):
        return dict(value), f"{where}: deepspeed"
    if not isinstance(value, str):
        given = shorten(repr(value), 200)
        raise AutotuneError(f"{where}: deepspeed: {given} is neither a path nor a mapping.")
    for path in (Path(value), folder / value):
        if os.path.isfile(path):
            return read_json_mapping(path), str(path)
    name = Path(value).name
    wanted = name if name.endswith(".json") else f"{name}.json"
    if wanted in preset_names() and Path(value).parent.name in ("", PRESET_FOLDER):
        return read_json_mapping(Path(str(data_dir(PRESET_FOLDER) / wanted))), f"preset {wanted}"
    raise AutotuneError(
        f"{where}: deepspeed: {shorten(value, 200)}: no such file from {Path.cwd()} or {folder}, "
        f"and no preset of that name.{_nearest_files(value, folder)} Shipped presets: "
        f"{', '.join(preset_names())}."
    )


def _nearest_files(value: str, folder: Path) -> str:
    """Return ``" Nearest: a, b."``: presets, and JSON files where the path was looked for."""
    by_name = {name.removesuffix(".json"): name for name in preset_names()}
    for parent in (Path(value).parent, folder / Path(value).parent):
        if os.path.isdir(parent):
            by_name |= {path.stem: str(path) for path in parent.glob("*.json")}
    stem = Path(value).name.removesuffix(".json").lower()
    close = difflib.get_close_matches(stem, by_name, n=3)
    return f" Nearest: {', '.join(by_name[name] for name in close)}." if close else ""
