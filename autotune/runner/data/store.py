"""Tokenised documents on disk, so that no more of them is in memory than a batch needs."""

from __future__ import annotations

import hashlib
import json
import mmap
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from autotune.runner.data.documents import Document

Int64 = npt.NDArray[np.int64]
_TOKENS, _TRAINED, _SIZES, _DIGEST = "tokens.i32", "trained.u8", "sizes.npy", "digest.json"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Documents:
    """Documents behind each other: in memory, or in two mapped files.

    What was read from the files is given back to the kernel at once: it stays in the kernel's cache
    while there is room, and does not count as this process's memory. The mappings outlive the
    files, so an emptied cache does not stop a run.
    """

    tokens: npt.NDArray[np.int32]
    trained: npt.NDArray[np.bool_]
    sizes: Int64
    """Tokens of each document."""
    offsets: Int64
    """Where each document starts."""
    digest: str
    """Equal for equal documents."""
    mappings: tuple[mmap.mmap, ...] = ()

    @classmethod
    def in_memory(cls, documents: Sequence[Document]) -> Self:
        """Hold them as they are."""
        sizes = np.asarray([len(document.input_ids) for document in documents], dtype=np.int64)
        digest = hashlib.sha256()
        for document in documents:
            for part in _bytes(document):
                digest.update(part)
        digest.update(sizes.astype("<i8").tobytes())
        return cls(
            tokens=np.concatenate([document.input_ids for document in documents]),
            trained=np.concatenate([document.trained for document in documents]),
            sizes=sizes,
            offsets=np.cumsum(sizes) - sizes,
            digest=digest.hexdigest(),
        )

    @classmethod
    def write(cls, documents: Iterable[Document], folder: Path) -> Self:
        """Write them into an empty folder, one after another, and open them.

        Memory: 8 bytes a document while writing, 16 when open.
        """
        sizes = array("q")
        digest = hashlib.sha256()
        with (folder / _TOKENS).open("wb") as tokens, (folder / _TRAINED).open("wb") as trained:
            for document in documents:
                ids, mask = _bytes(document)
                tokens.write(ids)
                trained.write(mask)
                digest.update(ids)
                digest.update(mask)
                sizes.append(len(document.input_ids))
        np.save(folder / _SIZES, np.asarray(sizes, dtype="<i8"))
        # The sizes say where one document ends: without them other documents could have its digest.
        digest.update(np.asarray(sizes, dtype="<i8").tobytes())
        (folder / _DIGEST).write_text(json.dumps(digest.hexdigest()))
        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open what `write` wrote.

        Raises:
            ValueError, FileNotFoundError, EOFError: it is not whole.
        """
        sizes = np.load(folder / _SIZES)
        tokens, trained = _map(folder / _TOKENS), _map(folder / _TRAINED)
        total = int(sizes.sum())
        if (len(tokens), len(trained)) != (4 * total, total):
            raise ValueError(f"{folder} is not whole")
        return cls(
            tokens=np.frombuffer(tokens, dtype="<i4"),
            trained=np.frombuffer(trained, dtype=np.bool_),
            sizes=sizes,
            offsets=np.cumsum(sizes) - sizes,
            digest=json.loads((folder / _DIGEST).read_text()),
            mappings=(tokens, trained),
        )

    def __len__(self) -> int:
        return len(self.sizes)

    def num_trained(self) -> Int64:
        """Return of each document how many tokens the loss is taken on; nothing predicts the first.

        Reads every mask, a byte a token.
        """
        counts = np.add.reduceat(self.trained, self.offsets, dtype=np.int64)
        counts -= self.trained[self.offsets]
        self._release()
        return counts

    def read(self, numbers: Int64) -> list[Document]:
        """Return some documents, by number."""
        found = []
        for number in numbers:
            part = slice(self.offsets[number], self.offsets[number] + self.sizes[number])
            found.append(
                Document(input_ids=self.tokens[part].copy(), trained=self.trained[part].copy())
            )
        self._release()
        return found

    def _release(self) -> None:
        for mapping in self.mappings:
            mapping.madvise(mmap.MADV_DONTNEED)


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _bytes(document: Document) -> tuple[bytes, bytes]:
    return document.input_ids.astype("<i4").tobytes(), document.trained.astype("u1").tobytes()
