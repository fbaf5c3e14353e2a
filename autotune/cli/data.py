"""The `--data` flag: a file, a folder or a Hub id as a dataset entry."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from autotune.errors import AutotuneError
from autotune.spec.training import DatasetSource

DATA_TYPES = ("completion", "alpaca", "chat_template")
_TYPE_BY_COLUMN = {"text": "completion", "instruction": "alpaca", "messages": "chat_template"}


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--data`` and ``--data-type``."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", metavar="PATH", help="JSONL, JSON, CSV, Parquet or text file, or a Hub id"
    )
    group.add_argument(
        "--data-type",
        choices=DATA_TYPES,
        help="what a row is (default: told from its columns: text, instruction or messages)",
    )


def dataset_from(args: argparse.Namespace) -> DatasetSource | None:
    """Return the entry of `datasets:` the flags state.

    Raises:
        AutotuneError: the file does not exist, or its columns tell no type.
    """
    if args.data is None:
        return None
    path = Path(args.data).expanduser()
    looks_local = path.suffix != "" or args.data.startswith((".", "/", "~"))
    if looks_local and not path.exists():
        raise AutotuneError(f"There is no {args.data}. Give --data an existing file or a Hub id.")
    kind = args.data_type or (_type_from_columns(path) if path.is_file() else "completion")
    return DatasetSource(path=str(path.resolve()) if path.exists() else args.data, type=kind)


def _type_from_columns(path: Path) -> str:
    if path.suffix not in (".jsonl", ".json"):
        return "completion"
    row = _first_row(path)
    for column, kind in _TYPE_BY_COLUMN.items():
        if column in row:
            return kind
    raise AutotuneError(
        f"{path} has the columns {', '.join(sorted(row)) or '(none)'}; one of "
        f"{', '.join(_TYPE_BY_COLUMN)} is needed, or say with --data-type what a row is."
    )


def _first_row(path: Path) -> dict[str, Any]:
    with path.open(encoding="utf-8", errors="replace") as file:
        line = next((line for line in file if line.strip()), "")
    if line.lstrip().startswith("["):
        return _first_of_list(path)
    try:
        row = json.loads(line) if line else {}
    except json.JSONDecodeError as error:
        raise AutotuneError(f"{path}, line 1 is not JSON: {error.msg}.") from None
    if not isinstance(row, dict):
        raise AutotuneError(f"{path}, line 1 is not a JSON object.")
    return row


def _first_of_list(path: Path) -> dict[str, Any]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise AutotuneError(f"{path}, line {error.lineno} is not JSON: {error.msg}.") from None
    if not rows or not isinstance(rows[0], dict):
        raise AutotuneError(f"{path} holds no list of JSON objects.")
    first: dict[str, Any] = rows[0]
    return first
