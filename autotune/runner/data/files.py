"""Which local files a data set stands for."""

from __future__ import annotations

import re
from pathlib import Path

from autotune.errors import AutotuneError, nearest
from autotune.spec.training import DatasetSource

KIND_BY_SUFFIX = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
COMPRESSED = (".gz", ".bz2", ".xz")
_KINDS = ("json", "csv", "parquet", "text")
_PATTERN = re.compile(r"[*?\[]")


def local_files(source: DatasetSource) -> list[Path] | None:
    """Return the files of a local data set, or None for the name of a Hub data set.

    Raises:
        AutotuneError: as `_local_files`, or a path or pattern no system can look for.
    """
    try:
        return _local_files(source)
    except (OSError, RuntimeError, ValueError, IndexError) as error:
        # Too long, an unknown ~user or a loop of links, a NUL, and a pattern such as "**x".
        raise AutotuneError(
            f"The data {source.path[:200]!r} cannot be looked for: {error}. Check path and "
            "data_files."
        ) from error


def _local_files(source: DatasetSource) -> list[Path] | None:
    """Return the files of a local data set, or None for the name of a Hub data set.

    A folder stands for the files below it that have a known suffix and belong to the split, which
    `datasets` tells from their names (``test.jsonl``, ``data/train-00000.parquet``); files with no
    split in their names are all of `train`. A file that several patterns match is read once.

    Raises:
        AutotuneError: the path looks like a file and is missing, a pattern matches nothing, or a
            folder holds no data of the split.
    """
    if source.path in (*_KINDS, "jsonl"):  # `load_dataset("json", data_files=...)`
        if not source.data_files:
            raise AutotuneError(
                f"path: {source.path} names a kind of file. Name the files in data_files."
            )
        return _matching(Path(), source.data_files)
    path = Path(source.path).expanduser()
    if path.is_dir():
        if source.data_files:
            return _matching(path, source.data_files)
        return _of_folder(path, split_name(source.split))
    if path.is_file():
        return [path]
    if _PATTERN.search(source.path):
        return _matching(Path(), [source.path])
    if (
        path.is_absolute()
        or source.path.startswith((".", "~"))
        or data_suffix(path) in KIND_BY_SUFFIX
    ):
        raise AutotuneError(f"There is no data file {source.path}. Check the path.")
    return None


def file_kind(path: Path, source: DatasetSource) -> str:
    """Return json, csv, parquet or text.

    Raises:
        AutotuneError: a `ds_type` that is not known, or a file with no known suffix and none given.
    """
    kind = source.ds_type or (source.path if source.path in (*_KINDS, "jsonl") else None)
    kind = kind or KIND_BY_SUFFIX.get(data_suffix(path))
    kind = "json" if kind == "jsonl" else kind
    if kind is None:
        raise AutotuneError(
            f"{path} has no known suffix ({', '.join(KIND_BY_SUFFIX)}; with "
            f"{', '.join(COMPRESSED)} behind it where compressed). "
            f"Set ds_type to one of {', '.join(_KINDS)}."
        )
    if kind not in _KINDS:
        raise AutotuneError(
            f"ds_type {kind!r} is not known; allowed: {', '.join(_KINDS)}.{nearest(kind, _KINDS)}"
        )
    return kind


def data_suffix(path: Path) -> str:
    """Return the suffix that tells the kind: ``.jsonl`` of ``a.jsonl.gz``."""
    if path.suffix.lower() in COMPRESSED:
        path = path.with_suffix("")
    return path.suffix.lower()


def split_name(split: str) -> str:
    """Return the split without its slice: ``train`` of ``train[:10%]``."""
    return split.partition("[")[0]


def saved_dataset(source: DatasetSource) -> Path | None:
    """Return the folder if `Dataset.save_to_disk` wrote it."""
    path = Path(source.path).expanduser()
    marks = ("state.json", "dataset_dict.json")
    return path if any((path / mark).is_file() for mark in marks) else None


def _matching(folder: Path, patterns: list[str]) -> list[Path]:
    found: dict[Path, Path] = {}  # by what they are, so that no file is read twice
    for pattern in patterns:
        expanded = Path(pattern).expanduser()
        root = Path(expanded.anchor) if expanded.is_absolute() else folder
        relative = str(expanded.relative_to(expanded.anchor))
        matches = sorted(path for path in root.glob(relative) if path.is_file())
        literal = root / relative
        if not matches and literal.is_file():  # a name with brackets in it
            matches = [literal]
        if not matches:
            raise AutotuneError(f"No data file matches {literal}. Check data_files and the path.")
        for path in matches:
            found.setdefault(path.resolve(), path)
    return list(found.values())


def _of_folder(folder: Path, split: str) -> list[Path]:
    known = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and data_suffix(path) in KIND_BY_SUFFIX and not _hidden(path, folder)
    )
    if not known:
        raise AutotuneError(
            f"The data folder {folder} holds no data file. "
            f"Known suffixes: {', '.join(KIND_BY_SUFFIX)}."
        )
    by_split = _splits(folder, known)
    if split not in by_split:
        raise AutotuneError(
            f"The data folder {folder} has no files of the split {split!r}; "
            f"found: {', '.join(by_split)}. Set split, or name the files in data_files."
        )
    return by_split[split]


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _splits(folder: Path, known: list[Path]) -> dict[str, list[Path]]:
    from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns

    base = folder.resolve()
    try:
        patterns = get_data_patterns(str(base))
    except EmptyDatasetError as error:
        raise AutotuneError(
            f"The splits of the data folder {folder} cannot be told: its name reads as a pattern. "
            "Name the files in data_files."
        ) from error
    resolved = DataFilesDict.from_patterns(patterns, base_path=str(base))
    # Links count by the name they have here: what they lead to may be called anything.
    wanted = {str(base / path.relative_to(folder)): path for path in known}
    splits = {
        str(name): sorted(wanted[file] for file in set(files) if file in wanted)
        for name, files in resolved.items()
    }
    found = {name: files for name, files in splits.items() if files}
    return found or {"train": known}
