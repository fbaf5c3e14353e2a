"""Lay documents into sequences of one length."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from autotune.errors import AutotuneError
from autotune.runner.data.documents import IGNORE, Document
from autotune.runner.data.store import Documents, Int64

Int32 = npt.NDArray[np.int32]

_WINDOW = 100_000
"""Documents packed together: bounds the memory and keeps neighbours near each other."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rows:
    """Some sequences, laid out; every array but `lengths` is ``[num_sequences, seq_len]``."""

    input_ids: Int32
    position_ids: Int32
    """Restarts at 0 for each document, and for the padding."""
    shift_labels: Int32
    """What each token has to predict: the next token of its own document, or -100."""
    document_ids: Int32
    """Number of the document inside its sequence; the padding counts as one more document."""
    lengths: Int32
    """``[num_sequences]``: tokens before the padding."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Sequences:
    """Sequences to train on: which documents stand in each. They are laid out when read.

    Memory: 8 bytes a document and 8 a sequence, beside what `Documents` takes.
    """

    documents: Documents
    order: Int64
    """Numbers of the documents, sequence by sequence."""
    starts: Int64
    """``[num_sequences + 1]``: where each sequence starts in `order`, and its end."""
    seq_len: int
    """Tokens a sequence, padding included."""
    pad_token_id: int

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def efficiency(self) -> float:
        """Share of the tokens that are not padding."""
        return float(self.documents.sizes[self.order].sum()) / (len(self) * self.seq_len)

    def mean_trained_tokens(self) -> float:
        """Return the tokens a sequence that the loss is taken on, averaged over all of them.

        Reads the mask of every document: a byte a token.
        """
        return float(self.documents.num_trained()[self.order].sum()) / len(self)

    def digest(self) -> str:
        """Return a text that is equal for equal sequences."""
        whole = hashlib.sha256(f"{self.documents.digest} {self.seq_len}".encode())
        whole.update(self.order.tobytes())
        whole.update(self.starts.tobytes())
        return whole.hexdigest()[:16]

    def take(self, indices: npt.NDArray[np.int64]) -> Sequences:
        """Return the sequences of these numbers, in this order."""
        sizes = np.diff(self.starts)[indices]
        starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        moved = np.repeat(self.starts[:-1][indices] - starts[:-1], sizes)
        return replace(self, order=self.order[np.arange(starts[-1]) + moved], starts=starts)

    def rows(self, indices: Sequence[int] | Int64) -> Rows:
        """Lay out the sequences of these numbers."""
        groups = [
            self.documents.read(self.order[self.starts[i] : self.starts[i + 1]]) for i in indices
        ]
        return _lay_out(groups, self.seq_len, self.pad_token_id)


def pack(documents: Documents, seq_len: int, *, packing: bool, pad_token_id: int) -> Sequences:
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
    sizes = documents.sizes
    if not len(sizes) or sizes.max() > seq_len:
        raise ValueError(f"need documents of 1 to {seq_len} tokens, got {len(sizes)} documents")
    if packing:
        order, starts = array("q"), array("q", [0])
        for group in _best_fit(sizes, seq_len):
            order.extend(group)
            starts.append(len(order))
    else:
        order = array("q", range(len(sizes)))
        starts = array("q", range(len(sizes) + 1))
    return Sequences(
        documents=documents,
        order=np.asarray(order, dtype=np.int64),
        starts=np.asarray(starts, dtype=np.int64),
        seq_len=seq_len,
        pad_token_id=pad_token_id,
    )


def _best_fit(sizes: Int64, capacity: int) -> Iterator[list[int]]:
    """Yield the members of each bin: best-fit decreasing, a window of documents at a time.

    Bit `s` of `open_spaces` says that some bin has exactly `s` tokens left, so the tightest bin
    that fits is found by one shift, whatever the number of bins.
    """
    for first in range(0, len(sizes), _WINDOW):
        window = sizes[first : first + _WINDOW].tolist()
        bins: list[list[int]] = []
        by_space: list[list[int]] = [[] for _ in range(capacity + 1)]
        open_spaces = 0
        for index in sorted(range(len(window)), key=lambda i: -window[i]):
            size = window[index]
            fitting = open_spaces >> size
            if fitting:
                space = size + (fitting & -fitting).bit_length() - 1
                number = by_space[space].pop()
                if not by_space[space]:
                    open_spaces ^= 1 << space
            else:
                space, number = capacity, len(bins)
                bins.append([])
            bins[number].append(first + index)
            by_space[space - size].append(number)
            open_spaces |= 1 << (space - size)
        yield from bins


def _lay_out(groups: Sequence[Sequence[Document]], seq_len: int, pad_token_id: int) -> Rows:
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
    return Rows(
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
    if val_set_size < 0 or (val_set_size > 1 and val_set_size != int(val_set_size)):
        raise AutotuneError(
            f"val_set_size is {val_set_size:g}; give a share below 1 or a whole number of "
            "sequences, 0 for none."
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
