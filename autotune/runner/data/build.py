"""From a request to the sequences its ranks read."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch.distributed as dist
import transformers
from transformers import PreTrainedTokenizerBase

from autotune.errors import AutotuneError
from autotune.runner.data.documents import load_documents, raw_text_of
from autotune.runner.data.packing import Sequences, pack, split_validation
from autotune.runner.data.rows import local_files
from autotune.runner.data.synthetic import synthetic_sequences
from autotune.runner.data.tokenizer import load_tokenizer
from autotune.spec.training import DatasetSource
from autotune.trial.protocol import Request

_CACHE_FORMAT = 1
"""Raise it when the same data would give other sequences."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingData:
    """What a launch trains and evaluates on."""

    train: Sequences
    validation: Sequences | None
    tokenizer: PreTrainedTokenizerBase | None
    """None with synthetic documents."""


@contextmanager
def local_rank0_first() -> Iterator[None]:
    """Let rank 0 of each host run the body before the others; without ranks, just run it.

    The others go on when it raised, too: they meet the same error and no rank waits for ever.
    """
    if not dist.is_initialized():
        yield
        return
    first = int(os.environ.get("LOCAL_RANK", dist.get_rank())) == 0
    if not first:
        dist.barrier()
    try:
        yield
    finally:
        if first:
            dist.barrier()


def build_sequences(
    request: Request,
    cache_dir: Path,
    rank0_first: Callable[[], AbstractContextManager[None]] = local_rank0_first,
) -> TrainingData:
    """Make the sequences of a request; every rank gets the same.

    Args:
        request: without `datasets` a trial gets synthetic documents.
        cache_dir: keeps trained tokenizers and packed sequences, named by the content of the local
            files (a Hub data set by its name and split).
        rank0_first: a context in which rank 0 of a host runs ahead of the others: it writes the
            cache, they read it.

    Raises:
        AutotuneError: bad data, or train mode without any.
    """
    vocab_size = _vocab_size(request)
    if not request.datasets:
        if request.mode == "train":
            raise AutotuneError("There is nothing to train on. Give the data with --data.")
        sequences = synthetic_sequences(request.workload, vocab_size, request.seed)
        return TrainingData(train=sequences, validation=None, tokenizer=None)
    with rank0_first():
        fingerprint = _fingerprint(request.datasets)
        tokenizer = load_tokenizer(
            request.model.tokenizer,
            texts=lambda: raw_text_of(request.datasets),
            vocab_size=vocab_size,
            save_dir=cache_dir / f"tokenizer-{_digest([str(vocab_size), fingerprint])}",
        )
        cache = _SequenceCache(request=request, tokenizer=tokenizer, folder=cache_dir)
        train = cache.get(request.datasets, fingerprint)
        if request.test_datasets:
            validation = cache.get(request.test_datasets, _fingerprint(request.test_datasets))
            return TrainingData(train=train, validation=validation, tokenizer=tokenizer)
    share = request.train.val_set_size if request.train else 0.0
    train, held_out = split_validation(train, share, request.seed)
    return TrainingData(train=train, validation=held_out, tokenizer=tokenizer)


def _vocab_size(request: Request) -> int:
    config = request.model.config
    # Multimodal configs keep the language model's values one level down.
    size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    if not size:
        raise AutotuneError(f"The config of {request.model.name} states no vocab_size.")
    return int(size)


@dataclass(frozen=True, kw_only=True, slots=True)
class _SequenceCache:
    """Packed sequences on disk, named by everything they follow from."""

    request: Request
    tokenizer: PreTrainedTokenizerBase
    folder: Path

    def get(self, sources: list[DatasetSource], fingerprint: str) -> Sequences:
        """Read them, or make and write them."""
        path = self._path(fingerprint)
        cached = _read(path)
        if cached is not None:
            return cached
        workload, tokenizer = self.request.workload, self.tokenizer
        documents = load_documents(sources, tokenizer, max_tokens=workload.seq_len)
        sequences = pack(
            documents,
            workload.seq_len,
            packing=workload.packing,
            pad_token_id=tokenizer.pad_token_id,
        )
        _write(sequences, path)
        return sequences

    def _path(self, fingerprint: str) -> Path:
        workload, tokenizer = self.request.workload, self.tokenizer
        versions = (_CACHE_FORMAT, transformers.__version__)
        special = (tokenizer.chat_template, tokenizer.eos_token_id, tokenizer.pad_token_id)
        name = _digest(
            [
                repr((versions, workload.seq_len, workload.packing, special)),
                tokenizer.backend_tokenizer.to_str(),
                fingerprint,
            ]
        )
        return self.folder / f"sequences-{name}.npz"


def _fingerprint(sources: Iterable[DatasetSource]) -> str:
    prints = []
    for source in sources:
        prints.append(json.dumps(source.model_dump(), sort_keys=True))
        for file in local_files(source) or ():
            with file.open("rb") as stream:
                prints.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return _digest(prints)


def _digest(parts: Iterable[str]) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(hashlib.sha256(part.encode()).digest())
    return whole.hexdigest()[:16]


def _read(path: Path) -> Sequences | None:
    try:
        # Opened here: `np.load` leaves a damaged file open.
        with path.open("rb") as file, np.load(file) as arrays:
            return Sequences(**{field.name: arrays[field.name] for field in fields(Sequences)})
    except (FileNotFoundError, zipfile.BadZipFile, KeyError, ValueError, EOFError):
        return None  # Absent or damaged: made anew.


def _write(sequences: Sequences, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        np.savez(file, **{f.name: getattr(sequences, f.name) for f in fields(sequences)})
    os.replace(temporary, path)
