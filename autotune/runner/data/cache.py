"""Packed sequences on disk, named by everything they follow from."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import transformers
from pydantic import TypeAdapter, ValidationError
from transformers import PreTrainedTokenizerBase

from autotune.errors import AutotuneError
from autotune.runner.data.documents import Document, DocumentReader, Limit
from autotune.runner.data.files import local_files, saved_dataset
from autotune.runner.data.packing import Sequences, pack
from autotune.runner.data.store import Documents
from autotune.spec.training import DatasetSource
from autotune.trial.data_counts import SourceCounts
from autotune.trial.protocol import Request

_CACHE_FORMAT = 2
"""Raise it when the same data would give other sequences."""
_HASHED_WHOLE_BYTES = 2**28
"""Larger files are known by their size, time of change, start and end."""
_EDGE_BYTES = 2**20
_ORDER, _STARTS, _COUNTS = "order.npy", "starts.npy", "counts.json"
_CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}
_COUNTS_TYPE = TypeAdapter(list[SourceCounts])


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceCache:
    """Makes sequences once; host memory stays bounded, whatever the size of the data."""

    request: Request
    tokenizer: PreTrainedTokenizerBase
    folder: Path

    def get(
        self, sources: list[DatasetSource], prints: str, limit: Limit
    ) -> tuple[Sequences, list[SourceCounts]]:
        """Read them, or make and write them; several processes make them once.

        Args:
            sources: the data sets.
            prints: their `fingerprint`.
            limit: how much of each is enough.

        Raises:
            AutotuneError: bad data, or no place for the cache.
        """
        path = self._path(prints, limit)
        with locked(path):
            found = self._read(path)
            if found is None:
                self._make(path, sources, limit)
                found = self._read(path)
        assert found is not None
        return found

    def _make(self, path: Path, sources: list[DatasetSource], limit: Limit) -> None:
        temporary = path.with_name(f".{path.name}.tmp")
        for leftover in (temporary, path):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir()
        try:
            self._write(temporary, sources, limit)
            os.rename(temporary, path)
        except OSError as error:
            if error.errno not in _CANNOT_WRITE:
                raise
            raise AutotuneError(
                f"The tokenised data cannot be written to {path.parent}: {error.strerror}. "
                "It takes 5 bytes a token. Make room, or name another folder with "
                "AUTOTUNE_CACHE_DIR."
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _write(self, folder: Path, sources: list[DatasetSource], limit: Limit) -> None:
        counts = [
            SourceCounts(
                path=source.path,
                type=source.type if isinstance(source.type, str) else "of its own",
            )
            for source in sources
        ]
        sequences = self._pack(Documents.write(self._documents(sources, counts, limit), folder))
        np.save(folder / _ORDER, sequences.order)
        np.save(folder / _STARTS, sequences.starts)
        (folder / _COUNTS).write_bytes(_COUNTS_TYPE.dump_json(counts))

    def _documents(
        self, sources: list[DatasetSource], counts: list[SourceCounts], limit: Limit
    ) -> Iterator[Document]:
        reader = DocumentReader(
            self.tokenizer, self.request.data, max_tokens=self.request.workload.seq_len
        )
        for source, count in zip(sources, counts, strict=True):
            yield from reader.read(source, count, limit)

    def _pack(self, documents: Documents) -> Sequences:
        workload = self.request.workload
        return pack(
            documents,
            workload.seq_len,
            packing=workload.packing,
            pad_token_id=self.tokenizer.pad_token_id,
        )

    def _read(self, path: Path) -> tuple[Sequences, list[SourceCounts]] | None:
        try:
            sequences = Sequences(
                documents=Documents.open(path),
                order=np.load(path / _ORDER),
                starts=np.load(path / _STARTS),
                seq_len=self.request.workload.seq_len,
                pad_token_id=self.tokenizer.pad_token_id,
            )
            return sequences, _COUNTS_TYPE.validate_json((path / _COUNTS).read_bytes())
        except (FileNotFoundError, ValueError, EOFError, ValidationError):
            return None  # Absent or damaged: made anew.

    def _path(self, prints: str, limit: Limit) -> Path:
        workload, tokenizer = self.request.workload, self.tokenizer
        versions = (_CACHE_FORMAT, transformers.__version__)
        special = (tokenizer.chat_template, tokenizer.eos_token_id, tokenizer.pad_token_id)
        name = digest_of(
            [
                repr((versions, workload.seq_len, workload.packing, special, limit)),
                self.request.data.model_dump_json(),
                tokenizer.backend_tokenizer.to_str(),
                prints,
            ]
        )
        return self.folder / f"sequences-{name}"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process of this host at a time make `path`; the kernel frees a dead one's lock.

    No collective: a long wait would run into the process group's time limit.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / f".{path.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def fingerprint(sources: Iterable[DatasetSource]) -> str:
    """Return a text that is equal for equal data sets: their entries and their files' content."""
    prints = []
    for source in sources:
        prints.append(json.dumps(source.model_dump(), sort_keys=True))
        saved = saved_dataset(source)
        files = sorted(saved.rglob("*.*")) if saved else local_files(source) or ()
        prints += [_file_print(file) for file in files if file.is_file()]
    return digest_of(prints)


def _file_print(file: Path) -> str:
    status = file.stat()
    with file.open("rb") as stream:
        if status.st_size <= _HASHED_WHOLE_BYTES:
            return hashlib.file_digest(stream, "sha256").hexdigest()
        edges = hashlib.sha256(stream.read(_EDGE_BYTES))
        stream.seek(-_EDGE_BYTES, os.SEEK_END)
        edges.update(stream.read())
    return f"{status.st_size} {status.st_mtime_ns} {edges.hexdigest()}"


def digest_of(parts: Iterable[str]) -> str:
    """Return one short digest of several texts."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(hashlib.sha256(part.encode()).digest())
    return whole.hexdigest()[:16]
