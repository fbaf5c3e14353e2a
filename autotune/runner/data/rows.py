"""Read the rows of a data set: local JSON, CSV, text and Parquet files, or a Hub data set.

Local text formats are read here and not by `datasets`: a message can then name the line, rows of
one file may differ in their columns, and no second copy lands in a cache.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotune.errors import AutotuneError, nearest
from autotune.spec.training import DatasetSource

_KIND_BY_SUFFIX = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One record of a data set."""

    where: str
    """File and line (or row number), for messages."""
    values: dict[str, Any]


def local_files(source: DatasetSource) -> list[Path] | None:
    """Return the files of a local data set in name order, or None for the name of a Hub data set.

    A folder stands for the files in it that have a known suffix.

    Raises:
        AutotuneError: the path looks like a file and is missing, or a folder holds no data.
    """
    path = Path(source.path).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in _KIND_BY_SUFFIX)
        if not files:
            raise AutotuneError(
                f"The data folder {source.path} holds no data file. "
                f"Known suffixes: {', '.join(_KIND_BY_SUFFIX)}."
            )
        return files
    if path.is_absolute() or source.path.startswith((".", "~")) or path.suffix in _KIND_BY_SUFFIX:
        raise AutotuneError(f"There is no data file {source.path}. Check the path.")
    return None


def read_rows(source: DatasetSource) -> Iterator[Row]:
    """Yield the rows in file order.

    A text file is one row with the column `text`: its paragraphs belong together, and the
    completion format cuts it to the sequence length. (`datasets` would make each line a row.)

    Raises:
        AutotuneError: a missing or unreadable file, a broken line, an unknown kind of file.
    """
    files = local_files(source)
    if files is None:
        yield from _read_hub(source)
        return
    for path in files:
        try:
            yield from _reader(path, source.ds_type)(path)
        except UnicodeDecodeError as error:
            raise AutotuneError(f"{path} is not UTF-8 text ({error.reason}).") from error
        except OSError as error:
            raise AutotuneError(f"{path} cannot be read: {error.strerror or error}.") from error


def _reader(path: Path, ds_type: str | None) -> Callable[[Path], Iterator[Row]]:
    readers = {"json": _read_json, "csv": _read_csv, "text": _read_text, "parquet": _read_parquet}
    kind = ds_type or _KIND_BY_SUFFIX.get(path.suffix.lower())
    if kind is None:
        raise AutotuneError(
            f"{path} has no known suffix ({', '.join(_KIND_BY_SUFFIX)}). "
            f"Set ds_type to one of {', '.join(readers)}."
        )
    kind = "json" if kind == "jsonl" else kind
    if kind not in readers:
        raise AutotuneError(
            f"ds_type {kind!r} is not known; allowed: {', '.join(readers)}.{nearest(kind, readers)}"
        )
    return readers[kind]


def _read_json(path: Path) -> Iterator[Row]:
    """Read one object a line, or one array of objects; the first character tells which."""
    with path.open(encoding="utf-8-sig") as file:
        start = file.read(4096).lstrip()[:1]
        file.seek(0)
        if start == "[":
            yield from _json_array(path, file.read())
            return
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _json_line(f"{path}:{number}", line)


def _json_line(where: str, line: str) -> Row:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise AutotuneError(
            f"{where} is not JSON: {error.msg} at column {error.colno}. "
            "Write one object a line, or one array of objects a file."
        ) from error
    return _object_row(where, values)


def _json_array(path: Path, text: str) -> Iterator[Row]:
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        raise AutotuneError(
            f"{path}:{error.lineno} is not JSON: {error.msg} at column {error.colno}."
        ) from error
    for number, values in enumerate(items, start=1):
        yield _object_row(f"{path} item {number}", values)


def _object_row(where: str, values: object) -> Row:
    if not isinstance(values, dict):
        raise AutotuneError(
            f"{where} is a JSON {type(values).__name__}, not an object with named columns."
        )
    return Row(where=where, values=values)


def _read_csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # The default of 128 KiB refuses a long document.
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for values in reader:
                where = f"{path}:{reader.line_num}"
                if None in values or None in values.values():
                    raise AutotuneError(
                        f"{where} does not have the {len(reader.fieldnames or ())} fields "
                        "of the header."
                    )
                yield Row(where=where, values=dict(values))
        except csv.Error as error:
            raise AutotuneError(f"{path}:{reader.line_num} is not CSV: {error}.") from error


def _read_text(path: Path) -> Iterator[Row]:
    yield Row(where=str(path), values={"text": path.read_text(encoding="utf-8-sig")})


def _read_parquet(path: Path) -> Iterator[Row]:
    from datasets import load_dataset

    try:
        # Streaming reads the file in place; the other way copies it into a cache first.
        rows = load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        for number, values in enumerate(rows, start=1):
            yield Row(where=f"{path} row {number}", values=values)
    except ValueError as error:  # pyarrow.ArrowInvalid is one.
        raise AutotuneError(f"{path} is not a Parquet file: {error}") from error


def _read_hub(source: DatasetSource) -> Iterator[Row]:
    from datasets import load_dataset

    try:
        rows = load_dataset(source.path, split=source.split)
    except (OSError, ValueError) as error:  # Not found, no network, no such split.
        raise AutotuneError(
            f"{source.path!r} is no local file, and as a Hub data set (split {source.split!r}) "
            f"it cannot be loaded: {error}"
        ) from error
    for number, values in enumerate(rows, start=1):
        yield Row(where=f"{source.path} row {number}", values=values)
