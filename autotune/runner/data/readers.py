"""Read one local file row by row, in memory that does not grow with the file.

JSON, CSV and text are read here and not by `datasets`: a message can then name the line, rows of
one file may differ in their columns (`datasets` fills the gaps with nulls, which chat templates
see), and no second copy lands in a cache. Parquet goes through `datasets`.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from autotune.errors import AutotuneError

_TEXT_PIECE = 2**18
"""Characters of a text file that become one document."""
_JSON_READ = 2**16
_OPEN: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One record of a data set."""

    where: str
    """File and line (or row number), for messages."""
    values: dict[str, Any]


def read_file(path: Path, kind: str) -> Iterator[Row]:
    """Yield the rows of a file of a kind that `files.file_kind` returned.

    Raises:
        AutotuneError: an unreadable file or a broken row.
    """
    try:
        if kind == "parquet":
            yield from _read_parquet(path)
            return
        with _text_of(path) as file:
            yield from {"json": _read_json, "csv": _read_csv, "text": _read_text}[kind](path, file)
    except UnicodeDecodeError as error:
        raise AutotuneError(f"{path} is not UTF-8 text ({error.reason}).") from error
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise AutotuneError(f"{path} is damaged: it cannot be decompressed ({error}).") from error
    except OSError as error:
        raise AutotuneError(f"{path} cannot be read: {error.strerror or error}.") from error


def _text_of(path: Path) -> TextIO:
    opener = _OPEN.get(path.suffix.lower())
    raw = opener(path) if opener else path.open("rb")
    # CSV wants line ends inside quotes as they are; JSON and text do not care.
    return io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")


def _read_json(path: Path, file: TextIO) -> Iterator[Row]:
    """Read one object a line, or one array of objects; the first character tells which."""
    start = file.read(1)
    while start.isspace():
        start = file.read(1)
    file.seek(0)
    if start == "[":
        yield from _JsonArray(path, file).rows()
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
    except (ValueError, RecursionError) as error:  # too many digits, or nested too deeply
        raise AutotuneError(f"{where} cannot be read: {error}.") from error
    return _object_row(where, values)


class _JsonArray:
    """Decodes the objects of one array in turn, reading on only when one is not whole yet."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self._path = path
        self._file = file
        self._text = ""
        self._line = 1
        self._decoder = json.JSONDecoder()

    def rows(self) -> Iterator[Row]:
        self._take("[")
        number = 0
        while self._peek() != "]":
            if number:
                self._take(",")
            number += 1
            yield _object_row(f"{self._path} item {number}", self._item())
        self._drop(1)
        if not self._ended():
            raise self._broken("something stands behind the array", self._line)

    def _item(self) -> object:
        self._peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text)
            except json.JSONDecodeError as error:
                # What is cut off fails at the end of the text, but for a string: at its start.
                cut_off = error.pos > len(self._text) - 16 or error.msg.startswith("Unterminated")
                if not (cut_off and self._read()):
                    raise self._broken(error.msg, self._line + error.lineno - 1) from error
            except (ValueError, RecursionError) as error:  # too many digits, nested too deeply
                raise self._broken(str(error), self._line) from error
            else:
                self._drop(end)
                return value

    def _peek(self) -> str:
        """Return the next character that is no space."""
        if self._ended():
            raise self._broken("the array does not end", self._line)
        return self._text[0]

    def _ended(self) -> bool:
        """Skip spaces; say whether the file ends there."""
        while True:
            self._drop(len(self._text) - len(self._text.lstrip()))
            if self._text:
                return False
            if not self._read():
                return True

    def _take(self, wanted: str) -> None:
        if self._peek() != wanted:
            raise self._broken(f"{wanted!r} is missing", self._line)
        self._drop(1)

    def _drop(self, count: int) -> None:
        self._line += self._text.count("\n", 0, count)
        self._text = self._text[count:]

    def _read(self) -> bool:
        """Read as much again as there is, so that a long item is not decoded over and over."""
        more = self._file.read(max(_JSON_READ, len(self._text)))
        self._text += more
        return bool(more)

    def _broken(self, why: str, line: int) -> AutotuneError:
        return AutotuneError(f"{self._path}:{line} is not JSON: {why}.")


def _object_row(where: str, values: object) -> Row:
    if not isinstance(values, dict):
        raise AutotuneError(
            f"{where} is a JSON {type(values).__name__}, not an object with named columns."
        )
    return Row(where=where, values=values)


def _read_csv(path: Path, file: TextIO) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # The default of 128 KiB refuses a long document.
    reader = csv.DictReader(file, strict=True)
    try:
        for values in reader:
            where = f"{path}:{reader.line_num}"
            if None in values or None in values.values():
                fields = len(reader.fieldnames or ())
                raise AutotuneError(f"{where} does not have the {fields} fields of the header.")
            yield Row(where=where, values=dict(values))
    except csv.Error as error:
        raise AutotuneError(f"{path}:{reader.line_num} is not CSV: {error}.") from error


def _read_text(path: Path, file: TextIO) -> Iterator[Row]:
    """Make the file one document; a longer one, one of each 256 Ki characters, cut at a line.

    (`datasets` would make each line a row, and tear a text's paragraphs apart.)
    """
    number, kept = 0, ""
    while piece := file.read(_TEXT_PIECE):
        if "\0" in piece:
            raise AutotuneError(f"{path} is not text: it holds bytes that are zero.")
        number, text = number + 1, kept + piece
        cut = text.rfind("\n") + 1 or len(text)
        if len(piece) < _TEXT_PIECE:
            cut = len(text)
        kept = text[cut:]
        yield Row(where=f"{path} part {number}", values={"text": text[:cut]})
    if kept:
        yield Row(where=f"{path} part {number + 1}", values={"text": kept})


def _read_parquet(path: Path) -> Iterator[Row]:
    from datasets import load_dataset

    try:
        # Streaming reads the file in place; the other way copies it into a cache first.
        rows = load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        for number, values in enumerate(rows, start=1):
            yield Row(where=f"{path} row {number}", values=values)
    except ValueError as error:  # pyarrow.ArrowInvalid is one.
        raise AutotuneError(f"{path} is not a Parquet file: {error}") from error
