"""Lay documents into sequences of one length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from autotune.errors import AutotuneError
from autotune.runner.data.documents import IGNORE, Document

Int32 = npt.NDArray[np.int32]

_WINDOW = 100_000
"""Documents packed together: bounds the memory and keeps neighbours near each other."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Sequences:
    """Sequences ready to train on; every array is ``[num_sequences, seq_len]``."""

    input_ids: Int32
    position_ids: Int32
    """Restarts at 0 for each document, and for the padding."""
    shift_labels: Int32
    """What each token has to predict: the next token of its own document, or -100."""
    document_ids: Int32
    """Number of the document inside its sequence; the padding counts as one more document."""
    lengths: Int32
    """``[num_sequences]``: tokens before the padding."""

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def seq_len(self) -> int:
        """Tokens a sequence, padding included."""
        return self.input_ids.shape[1]

    @property
    def num_valid_tokens(self) -> int:
        """Tokens with a label."""
        return int((self.shift_labels != IGNORE).sum())

    @property
    def efficiency(self) -> float:
        """Share of the tokens that are not padding."""
        return float(self.lengths.sum()) / self.input_ids.size

    @property
    def valid_fraction(self) -> float:
        """Share of the tokens that have a label."""
        return self.num_valid_tokens / self.input_ids.size

    def take(self, indices: npt.NDArray[np.int64]) -> Sequences:
        """Return the sequences of these numbers, in this order."""
        return Sequences(**{f.name: getattr(self, f.name)[indices] for f in fields(self)})


def pack(
    documents: Sequence[Document], seq_len: int, *, packing: bool, pad_token_id: int
) -> Sequences:
    """Lay documents into sequences; no document is split, none sees another's tokens.

    Args:
        documents: each of `seq_len` tokens at most.
        seq_len: tokens a sequence.
        packing: put several documents into a sequence (best fit, longest first; the same documents
            always give the same sequences); otherwise each gets a sequence of its own.
        pad_token_id: fills the rest of a sequence.

    Raises:
        ValueError: no document, or one longer than `seq_len`.
    """
    sizes = [len(document.input_ids) for document in documents]
    if not sizes or max(sizes) > seq_len:
        raise ValueError(f"need documents of 1 to {seq_len} tokens, got {len(sizes)} documents")
    groups = list(_best_fit(sizes, seq_len)) if packing else [[i] for i in range(len(sizes))]
    return _lay_out([[documents[i] for i in group] for group in groups], seq_len, pad_token_id)


def _best_fit(sizes: Sequence[int], capacity: int) -> Iterator[list[int]]:
    """Yield the members of each bin: best-fit decreasing, a window of documents at a time.

    Bit `s` of `open_spaces` says that some bin has exactly `s` tokens left, so the tightest bin
    that fits is found by one shift, whatever the number of bins.
    """
    for first in range(0, len(sizes), _WINDOW):
        window = range(first, min(first + _WINDOW, len(sizes)))
        bins: list[list[int]] = []
        by_space: list[list[int]] = [[] for _ in range(capacity + 1)]
        open_spaces = 0
        for index in sorted(window, key=lambda i: -sizes[i]):
            size = sizes[index]
            fitting = open_spaces >> size
            if fitting:
                space = size + (fitting & -fitting).bit_length() - 1
                number = by_space[space].pop()
                if not by_space[space]:
                    open_spaces ^= 1 << space
            else:
                space, number = capacity, len(bins)
                bins.append([])
            bins[number].append(index)
            by_space[space - size].append(number)
            open_spaces |= 1 << (space - size)
        yield from bins


def _lay_out(groups: Sequence[Sequence[Document]], seq_len: int, pad_token_id: int) -> Sequences:
    shape = (len(groups), seq_len)
    input_ids = np.full(shape, pad_token_id, dtype=np.int32)
    position_ids = np.empty(shape, dtype=np.int32)
    shift_labels = np.full(shape, IGNORE, dtype=np.int32)
    document_ids = np.empty(shape, dtype=np.int32)
    lengths = np.empty(len(groups), dtype=np.int32)
    positions = np.arange(seq_len, dtype=np.int32)
    for row, group in enumerate(groups):
        start = 0
        for number, document in enumerate(group):
            end = start + len(document.input_ids)
            input_ids[row, start:end] = document.input_ids
            position_ids[row, start:end] = positions[: end - start]
            shift_labels[row, start : end - 1] = document.labels[1:]
            document_ids[row, start:end] = number
            start = end
        position_ids[row, start:] = positions[: seq_len - start]
        document_ids[row, start:] = len(group)
        lengths[row] = start
    return Sequences(
        input_ids=input_ids,
        position_ids=position_ids,
        shift_labels=shift_labels,
        document_ids=document_ids,
        lengths=lengths,
    )


def split_validation(
    sequences: Sequences, val_set_size: float, seed: int
) -> tuple[Sequences, Sequences | None]:
    """Hold out a share (below 1) or a count (1 and above) of the sequences, drawn by `seed`.

    A share is rounded, to one sequence at least.

    Returns:
        The training sequences in their old order, and the held-out ones or None for a size of 0.

    Raises:
        AutotuneError: a negative size, or nothing would be left to train on.
    """
    total = len(sequences)
    if val_set_size < 0:
        raise AutotuneError(
            f"val_set_size is {val_set_size:g}; give a share or a count, 0 for none."
        )
    if val_set_size == 0:
        return sequences, None
    count = int(val_set_size) if val_set_size >= 1 else max(1, round(val_set_size * total))
    if count >= total:
        raise AutotuneError(
            f"val_set_size {val_set_size:g} holds out {count} of {total} sequences and leaves "
            f"none to train on. Give more data or at most {total - 1}."
        )
    order = np.random.default_rng(seed).permutation(total)
    return sequences.take(np.sort(order[count:])), sequences.take(np.sort(order[:count]))
