"""Read the rows of a data set: local files, a saved `Dataset`, or one of the Hub."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

from autotune.errors import AutotuneError
from autotune.runner.data.files import file_kind, local_files, saved_dataset, split_name
from autotune.runner.data.readers import Row, read_file
from autotune.spec.training import DatasetSource


def read_rows(source: DatasetSource, *, streaming: bool = False) -> Iterator[Row]:
    """Yield the rows of the split's slice in file order, less those `skip` and `shards` leave out.

    Args:
        source: what to read.
        streaming: read a Hub data set as it comes instead of downloading it first.

    Raises:
        AutotuneError: missing or unreadable data, a broken row, an unknown split.
    """
    rows = _all_rows(source, streaming=streaming)
    rows = islice(rows, source.skip or 0, None)
    return islice(rows, source.shards_idx or 0, None, source.shards or 1)


def _all_rows(source: DatasetSource, *, streaming: bool) -> Iterator[Row]:
    saved = saved_dataset(source)
    if saved is not None:
        return _number(source.path, _load_saved(str(saved), source))
    files = local_files(source)
    if files is None:
        return _number(source.path, _load_hub(source, streaming=streaming))
    if source.name or source.revision:
        raise AutotuneError(
            f"{source.path} is a local data set; name and revision are for data sets of the Hub. "
            "Remove them."
        )
    if split_name(source.split) != "train" and not _is_folder(source):
        raise AutotuneError(
            f"split: {source.split}: the local file {source.path} has the one split `train`."
        )
    kinds = [(path, file_kind(path, source)) for path in files]

    def read() -> Iterator[Row]:
        for path, kind in kinds:
            yield from read_file(path, kind)

    return read() if "[" not in source.split else _slice(read, source.split)


def _is_folder(source: DatasetSource) -> bool:
    from pathlib import Path

    return not source.data_files and Path(source.path).expanduser().is_dir()


def _slice(read: Any, split: str) -> Iterator[Row]:
    """Yield the rows of a slice; `datasets` reads its notation, for which the rows are counted."""
    for start, end in _bounds(split, sum(1 for _ in read())):
        yield from islice(read(), start, end)


def _bounds(split: str, count: int) -> list[tuple[int, int]]:
    """Return the first row and the one behind the last of each part of a slice."""
    from datasets import ReadInstruction

    try:
        parts = ReadInstruction.from_spec(split).to_absolute({split_name(split): count})
    except (ValueError, AssertionError, KeyError) as error:
        raise AutotuneError(
            f"split: {split!r} cannot be read ({error}). "
            "Write a slice such as train[:1000], train[10%:20%] or train[:5%]+train[-5%:]."
        ) from error
    return [(part.from_ or 0, count if part.to is None else part.to) for part in parts]


def _number(name: str, rows: Iterable[dict[str, Any]]) -> Iterator[Row]:
    with _hub_errors(name):
        for number, values in enumerate(rows, start=1):
            yield Row(where=f"{name} row {number}", values=values)


def _load_saved(path: str, source: DatasetSource) -> Iterable[dict[str, Any]]:
    from datasets import DatasetDict, load_from_disk

    name = split_name(source.split)
    held = load_from_disk(path)
    if isinstance(held, DatasetDict):
        if name not in held:
            raise AutotuneError(
                f"{path} has no split {name!r}; found: {', '.join(str(key) for key in held)}."
            )
        held = held[name]
    elif name not in ("train", str(held.split)):
        raise AutotuneError(
            f"{path} holds one data set and no split {name!r}. Leave split out, or write train."
        )
    if "[" not in source.split:
        return held
    bounds = _bounds(source.split, len(held))
    return held.select([index for start, end in bounds for index in range(start, end)])


def _load_hub(source: DatasetSource, *, streaming: bool) -> Iterable[dict[str, Any]]:
    from datasets import load_dataset

    given = {"name": source.name, "revision": source.revision, "data_files": source.data_files}
    options: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if streaming:
        options["streaming"] = True
    with _hub_errors(source.path, split=source.split):
        return load_dataset(source.path, split=source.split, **options)


@contextmanager
def _hub_errors(name: str, split: str | None = None) -> Iterator[None]:
    """Say in one message what `datasets` says in many: not found, no network, no such split."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (OSError, ValueError, DatasetsError) as error:
        of_split = f" (split {split!r})" if split else ""
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise AutotuneError(
            f"{name!r} is no local file or folder, and as a Hub data set{of_split} it cannot be "
            f"loaded: {first.rstrip('.')}. Check the path, or the name and the network; what was "
            "loaded once is read from the cache."
        ) from error
