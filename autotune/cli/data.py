"""The `--data` flag: a file, a folder, a pattern or a Hub id as a dataset entry."""

from __future__ import annotations

import argparse
import csv
import glob
import gzip
import json
import zlib
from pathlib import Path
from typing import Any

from autotune.config.reading import read_text
from autotune.errors import AutotuneError
from autotune.spec.model.hub import is_hub_id
from autotune.spec.training import DATASET_TYPES, DatasetSource

_KEYS_BY_COLUMN: dict[str, dict[str, Any]] = {
    "text": {"type": "completion"},
    "instruction": {"type": "alpaca"},
    "messages": {"type": "chat_template"},
    "conversations": {
        "type": "chat_template",
        "field_messages": "conversations",
        "message_property_mappings": {"role": "from", "content": "value"},
    },
    "segments": {"type": "input_output"},
}
_READABLE = (".jsonl", ".json", ".csv", ".jsonl.gz", ".json.gz", ".csv.gz")
_DATA_SUFFIXES = (
    ".jsonl", ".json", ".csv", ".parquet", ".txt", ".text", ".md", ".gz", ".bz2", ".xz",
)  # fmt: skip
_FIRST_CHARACTERS = 2**20
"""Enough for the first row of any file but an odd one."""


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--data``, ``--data-type`` and ``--chat-template``."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        metavar="PATH",
        help="JSONL, JSON, CSV, Parquet or text; a file, a folder or a quoted pattern; or a Hub id",
    )
    group.add_argument(
        "--data-type",
        choices=DATASET_TYPES,
        metavar="TYPE",
        help=f"what a row is: {', '.join(DATASET_TYPES)} (default: told from its columns: "
        f"{', '.join(_KEYS_BY_COLUMN)})",
    )
    group.add_argument(
        "--chat-template",
        metavar="NAME",
        help="chatml, llama3, gemma, phi_3, or a file with a template (default: the tokenizer's)",
    )


def dataset_from(args: argparse.Namespace) -> DatasetSource | None:
    """Return the entry of `datasets:` the flags state.

    Raises:
        AutotuneError: the file does not exist, or its columns tell no type.
    """
    if args.data is None:
        if args.chat_template or args.data_type:
            flag = "--chat-template" if args.chat_template else "--data-type"
            raise AutotuneError(f"{flag} says how to read --data, and there is none.")
        return None
    path = Path(args.data).expanduser()
    found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    looks_local = path.suffix.lower() in _DATA_SUFFIXES or args.data.startswith((".", "/", "~"))
    if looks_local and not found and not path.exists():
        raise AutotuneError(f"There is no {args.data}. Give --data an existing file or a Hub id.")
    if not found and not path.exists() and not is_hub_id(args.data):
        raise AutotuneError(
            f"{args.data!r} is neither a file, a folder or a pattern that matches, nor a Hub id "
            "(ORG/NAME). Check the path."
        )
    keys = {"type": args.data_type} if args.data_type else _keys_from_columns(path, found)
    if args.chat_template:
        if keys["type"] != "chat_template":
            raise AutotuneError(f"--chat-template has no effect on data of type {keys['type']}.")
        keys = keys | _template(args.chat_template)
    local = found or path.exists()
    return DatasetSource(path=str(path.absolute()) if local else args.data, **keys)


def _template(given: str) -> dict[str, str]:
    path = Path(given).expanduser()
    if path.is_file():
        return {"chat_template": "jinja", "chat_template_jinja": read_text(path)}
    return {"chat_template": given}


def _keys_from_columns(path: Path, found: list[Path]) -> dict[str, Any]:
    """Tell the type from the first row; what cannot be read here is taken for text."""
    inside = sorted(path.rglob("*")) if path.is_dir() else found
    first = next((file for file in inside if file.name.lower().endswith(_READABLE)), None)
    if first is None:
        return {"type": "completion"}
    columns = _first_columns(first)
    for column, keys in _KEYS_BY_COLUMN.items():
        if column in columns:
            return keys
    raise AutotuneError(
        f"{first} has the columns {', '.join(sorted(columns)) or '(none)'}; one of "
        f"{', '.join(_KEYS_BY_COLUMN)} is needed, or say with --data-type what a row is."
    )


def _first_columns(path: Path) -> list[str]:
    try:
        with (
            gzip.open(path, "rt", encoding="utf-8-sig", errors="replace")
            if path.suffix == ".gz"
            else path.open(encoding="utf-8-sig", errors="replace")
        ) as file:
            start = file.read(_FIRST_CHARACTERS)
    except (OSError, EOFError, zlib.error) as error:
        raise AutotuneError(f"{path} cannot be read: {error}.") from error
    if ".csv" in path.suffixes:
        try:
            return next(csv.reader(start.splitlines()), [])
        except csv.Error as error:
            raise AutotuneError(f"{path} is not CSV: {error}.") from error
    return _columns_of_json(path, start)


def _columns_of_json(path: Path, start: str) -> list[str]:
    body = start.lstrip()
    skipped = len(start) - len(body)
    if body.startswith("["):
        body, skipped = body[1:].lstrip(), skipped + 1
    if not body or body.startswith("]"):
        return []
    if not body.startswith("{"):
        raise AutotuneError(f"{path} holds no JSON objects, or they are not in a list.")
    try:
        row, _ = json.JSONDecoder().raw_decode(body)
    except json.JSONDecodeError as error:
        line = start[:skipped].count("\n") + error.lineno
        raise AutotuneError(
            f"{path}, line {line} is not JSON: {error.msg}. (Only the first row was read; say with "
            "--data-type what a row is where it is longer than 2**20 characters.)"
        ) from None
    except (ValueError, RecursionError) as error:  # digits or brackets past what Python takes
        raise AutotuneError(f"{path}: its first row cannot be read: {error}.") from None
    return list(row)
