"""Find a model's config by what a person calls it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from autotune.errors import AutotuneError, nearest
from autotune.spec.catalogue import read_catalogue
from autotune.spec.model import hub
from autotune.spec.model.any_family import model_of_any_family
from autotune.spec.model.from_config import model_from_config
from autotune.spec.model.shape import ModelSpec

_LOG = logging.getLogger(__name__)
_WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def load_model(
    name_or_path: str, *, published: bool = False, any_family: bool = False
) -> ModelSpec:
    """Read a model by folder, config.json, catalogue name or Hub id.

    A folder that holds a config.json comes before a name of the catalogue, and the log says so.
    The config of a Hub id outside the catalogue comes from the Hub's cache, or is downloaded.

    Args:
        name_or_path: What the user calls it.
        published: Whether a catalogue name means the weights as they were published; else it is
            the model's shape alone. By its Hub id a model always means its weights.
        any_family: Whether a family whose training was not checked will do; it is counted by a
            child process with the training stack.

    Raises:
        AutotuneError: no such name or file, or an architecture that is not supported.
    """
    read = model_of_any_family if any_family else model_from_config
    entries = read_catalogue("models")
    by_name = {key.lower(): key for key in entries}
    by_name |= {entry["hub"].lower(): key for key, entry in entries.items() if "hub" in entry}
    path = Path(name_or_path).expanduser()
    looks_like_path = name_or_path.startswith((".", "/", "~")) or path.suffix == ".json"
    key = by_name.get(name_or_path.lower())
    if key and not looks_like_path and (path / "config.json").is_file():
        _LOG.warning("%s is a folder here: its files are used, not the catalogue's.", name_or_path)
        return _load_local(path, read)
    if key and not looks_like_path:
        entry = entries[key]
        published = published or name_or_path.lower() != key.lower()
        return model_from_config(
            key,
            entry["config"],
            weights=entry.get("hub") if published else None,
            tokenizer=entry.get("hub") or entry.get("config_of"),
        )
    if path.exists():
        return _load_local(path, read)
    if looks_like_path:
        raise AutotuneError(
            f"No model at {name_or_path!r}: no such file or folder. Give a folder with a "
            f"config.json, a config.json, or one of: {', '.join(entries)}."
        )
    if hub.is_hub_id(name_or_path):
        _refuse_restated(name_or_path, entries)
        config = _parse(hub.find_config(name_or_path))
        return read(
            name_or_path.split("/")[1], config, weights=name_or_path, tokenizer=name_or_path
        )
    raise AutotuneError(
        f"Unknown model {name_or_path!r}.{nearest(name_or_path, by_name)} Known: "
        f"{', '.join(entries)}. A Hub id (ORG/NAME) or a local folder with a config.json works too."
    )


def _refuse_restated(hub_id: str, entries: dict[str, dict[str, Any]]) -> None:
    for key, entry in entries.items():
        if entry.get("config_of", "").lower() == hub_id.lower():
            raise AutotuneError(
                f"{hub_id} cannot be trained from its weights: {entry['summary']}. Its shape is in "
                f"the catalogue: {key} (random weights)."
            )


def _load_local(path: Path, read: Callable[..., ModelSpec]) -> ModelSpec:
    path = path.absolute()  # best.yml must train from any folder
    folder = path if path.is_dir() else path.parent
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise AutotuneError(f"Model folder {str(path)!r} has no config.json.")
    config = _parse(file)
    whole_folder = file.name == "config.json"
    name = folder.resolve().name if whole_folder else file.stem
    model = read(
        name,
        config,
        weights=str(folder) if _holds(folder, _WEIGHT_PATTERNS) else None,
        tokenizer=str(folder) if _holds(folder, _TOKENIZER_FILES) else None,
    )
    return model.model_copy(update={"local_path": str(folder if whole_folder else file)})


def _parse(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of its digits, or nested too deeply, as well
        raise AutotuneError(f"{str(file)!r} is not a JSON file: {error}") from error
    except OSError as error:
        raise AutotuneError(f"Cannot read {str(file)!r}: {error.strerror}.") from error
    if not isinstance(config, dict):
        raise AutotuneError(f"{str(file)!r} is not a model config: it holds no JSON object.")
    return config


def _holds(folder: Path, patterns: tuple[str, ...]) -> bool:
    return any(next(folder.glob(pattern), None) for pattern in patterns)
