"""From a request to the sequences its ranks read."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from autotune.errors import AutotuneError
from autotune.runner.data.cache import SequenceCache, digest_of, fingerprint, locked
from autotune.runner.data.documents import Limit, raw_text_of
from autotune.runner.data.files import local_files, saved_dataset
from autotune.runner.data.packing import Sequences, split_validation
from autotune.runner.data.synthetic import synthetic_sequences
from autotune.runner.data.tokenizer import load_tokenizer
from autotune.trial.data_counts import DataCounts, SourceCounts
from autotune.trial.protocol import Request

_TRIAL_TOKENS = 2**22
"""Tokens of the user's data a trial reads at most, if two steps need no more: a search measures
speed, and must not wait until all of a large data set is tokenised."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingData:
    """What a launch trains and evaluates on."""

    train: Sequences
    validation: Sequences | None
    tokenizer: PreTrainedTokenizerBase | None
    """None with synthetic documents."""
    counts: DataCounts | None
    """None with synthetic documents."""


def build_sequences(request: Request, cache_dir: Path) -> TrainingData:
    """Make the sequences of a request; every rank gets the same.

    The first rank of a host to come makes them, the others wait for it and find them on disk.

    Args:
        request: without `datasets` a trial gets synthetic documents.
        cache_dir: keeps trained tokenizers and packed sequences, named by the content of the local
            files (a Hub data set by its name, revision and split).

    Raises:
        AutotuneError: bad data, or train mode without any.
    """
    vocab_size = vocab_size_of(request)
    if not request.datasets:
        if request.mode == "train":
            raise AutotuneError("There is nothing to train on. Give the data with --data.")
        sequences = synthetic_sequences(request.workload, vocab_size, request.seed)
        return TrainingData(train=sequences, validation=None, tokenizer=None, counts=None)
    if request.test_datasets and request.train and request.train.val_set_size:
        raise AutotuneError(
            "test_datasets and val_set_size exclude each other: both say what is held out."
        )
    limit = _limit(request)
    prints = fingerprint(request.datasets)
    tokenizer = _tokenizer(request, vocab_size, prints, cache_dir)
    cache = SequenceCache(request=request, tokenizer=tokenizer, folder=cache_dir)
    with _every_core(request.mode == "train"):
        everything, counts = cache.get(request.datasets, prints, limit)
        test: list[SourceCounts] = []
        if request.test_datasets:
            sources = request.test_datasets
            held_out, test = cache.get(sources, fingerprint(sources), Limit())
            train: Sequences = everything
            validation: Sequences | None = held_out
        else:
            share = request.train.val_set_size if request.train else 0.0
            train, validation = split_validation(everything, share, request.seed)
    return TrainingData(
        train=train,
        validation=validation,
        tokenizer=tokenizer,
        counts=DataCounts(
            train=counts,
            test=test,
            sequences=len(train),
            held_out_sequences=0 if validation is None else len(validation),
            seq_len=train.seq_len,
            padding_share=1 - train.efficiency,
        ),
    )


def _tokenizer(
    request: Request, vocab_size: int, prints: str, cache_dir: Path
) -> PreTrainedTokenizerBase:
    save_dir = cache_dir / f"tokenizer-{digest_of([str(vocab_size), prints])}"
    streaming = request.data.streaming
    with locked(save_dir):
        return load_tokenizer(
            request.model.tokenizer,
            texts=lambda: raw_text_of(request.datasets, streaming=streaming),
            vocab_size=vocab_size,
            save_dir=save_dir,
        )


def _limit(request: Request) -> Limit:
    """Return how much of each data set is enough.

    Raises:
        AutotuneError: a streamed Hub data set and no number of steps.
    """
    workload = request.workload
    if request.mode == "trial":
        trial = math.ceil(_TRIAL_TOKENS / workload.seq_len)
        needed = max(trial, 2 * workload.global_batch_size)
    elif request.data.streaming:
        remote = [s.path for s in request.datasets if not saved_dataset(s) and not local_files(s)]
        steps = request.train.max_steps if request.train else None
        if steps is None:
            if remote:
                raise AutotuneError(
                    f"{remote[0]} is streamed, so its length is not known. Set max_steps, or "
                    "streaming: false to download it first."
                )
            return Limit()
        held_out = request.train.val_set_size if request.train else 0.0
        needed = steps * workload.global_batch_size
        # One more than the share, because it is rounded.
        needed += int(held_out) if held_out >= 1 else math.ceil(needed * held_out / (1 - held_out))
        needed += 1
    else:
        return Limit()
    each = math.ceil(needed / len(request.datasets))
    if workload.packing:
        return Limit(tokens=each * workload.seq_len)
    return Limit(documents=each)


@contextmanager
def _every_core(wanted: bool) -> Iterator[None]:
    """Let `tokenizers` use every core while the others wait; a trial's memory baseline may not."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    if wanted:
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("TOKENIZERS_PARALLELISM", None)
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def vocab_size_of(request: Request) -> int:
    """Return how many tokens the model knows.

    Raises:
        AutotuneError: its config does not say.
    """
    config = request.model.config
    # Multimodal configs keep the language model's values one level down.
    size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    if not size:
        raise AutotuneError(f"The config of {request.model.name} states no vocab_size.")
    return int(size)
