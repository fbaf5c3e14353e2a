"""Which sequences each rank reads, and in which order."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from autotune.runner.data.documents import IGNORE
from autotune.runner.data.packing import Sequences

Batch = dict[str, torch.Tensor]
"""`input_ids`, `position_ids`, `shift_labels`: int64 ``[micro_batch_size, seq_len / cp]``, this
rank's contiguous part of each sequence. `full_document_ids`: int32 ``[micro_batch_size, seq_len]``,
the whole sequence, because Ulysses attention sees all of it."""


class StepOrder:
    """Which sequences each step trains on: one seeded permutation of all of them after another.

    A pure function of the position, so every rank agrees and a resumed run goes on exactly where
    it stopped (with the same numpy: its generators may change between versions). A step that
    crosses the end of an epoch goes on in the next permutation.
    """

    def __init__(
        self, num_sequences: int, global_batch_size: int, *, seed: int, shuffle: bool = True
    ) -> None:
        if num_sequences < 1 or global_batch_size < 1:
            raise ValueError("need at least one sequence, and one a step")
        self.num_sequences = num_sequences
        self.global_batch_size = global_batch_size
        self._seed = seed
        self._shuffle = shuffle

    def step(self, step: int) -> npt.NDArray[np.int64]:
        """Return the sequence numbers of an optimizer step, counted from 0."""
        return self.take(step * self.global_batch_size, self.global_batch_size)

    def take(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """Return the `count` sequence numbers from position `start` on, whatever a step is."""
        parts = []
        while count > 0:
            epoch, offset = divmod(start, self.num_sequences)
            part = self._epoch(epoch)[offset : offset + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts)

    def _epoch(self, epoch: int) -> npt.NDArray[np.int64]:
        if not self._shuffle:
            return np.arange(self.num_sequences)
        return _permutation(self.num_sequences, self._seed, epoch)


@lru_cache(maxsize=2)
def _permutation(num: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(num)


def steps_for_epochs(num_sequences: int, global_batch_size: int, num_epochs: float) -> int:
    """Return the optimizer steps that read every sequence `num_epochs` times; the last is full."""
    # The rounding keeps 0.1 + 0.2 epochs from costing a step more than 0.3.
    return max(1, math.ceil(round(num_sequences * num_epochs / global_batch_size, 6)))


class RankLoader:
    """This rank's micro-batches, without end.

    A step's global batch is the next ``micro_batch_size * dp_size * grad_accum_steps`` sequences of
    the order. Micro-step `j` of data-parallel rank `r` reads its rows
    ``[j * mbs * dp + r * mbs, + mbs)``, so each of them is read exactly once, and a split into
    other micro batches reads the same sequences. Sequence-parallel ranks of one data-parallel rank
    read the same rows, each its own part of the tokens.

    The position belongs to the loader, not to an iterator: a second `iter()` goes on where the
    first one stopped. There is no `__len__`: the caller states the number of steps, and with the
    Hugging Face Trainer sets `max_steps` and `ignore_data_skip`.
    """

    def __init__(
        self,
        sequences: Sequences,
        order: StepOrder,
        *,
        micro_batch_size: int,
        grad_accum_steps: int,
        dp_rank: int,
        dp_size: int,
        cp_rank: int = 0,
        cp_size: int = 1,
        start_step: int = 0,
    ) -> None:
        """Start where optimizer step `start_step` of the order begins."""
        _check_ranks(dp_rank, dp_size, cp_rank, cp_size, sequences.seq_len)
        if order.num_sequences != len(sequences):
            raise ValueError("the order is not of these sequences")
        self._sequences = sequences
        self._order = order
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._cp_rank, self._cp_size = cp_rank, cp_size
        self._micro_step = 0
        self.reconfigure(micro_batch_size, grad_accum_steps)
        self._position = start_step * order.global_batch_size

    @property
    def global_batch_size(self) -> int:
        """Sequences a step over all ranks at the present split.

        Train mode wants the order's; a trial's rungs have others.
        """
        return self.batch_size * self._dp_size * self.grad_accum_steps

    def reconfigure(self, micro_batch_size: int, grad_accum_steps: int) -> None:
        """Change the split from the next step on; the order goes on where it is.

        A trial's ladder calls it with any values: its global batch follows from them and is not
        the workload's.

        Raises:
            ValueError: in the middle of a step, where some ranks' rows would be read twice.
        """
        if self._micro_step:
            raise ValueError(f"micro-step {self._micro_step} of a step: reconfigure between steps")
        if micro_batch_size < 1 or grad_accum_steps < 1:
            raise ValueError("micro_batch_size and grad_accum_steps are 1 or more")
        self.batch_size = micro_batch_size
        self.grad_accum_steps = grad_accum_steps

    def __iter__(self) -> Iterator[Batch]:
        """Yield micro-batches, for ever."""
        while True:
            yield self._next()

    def _next(self) -> Batch:
        across = self.batch_size * self._dp_size
        start = self._position + self._micro_step * across + self._dp_rank * self.batch_size
        rows = self._order.take(start, self.batch_size)
        self._micro_step += 1
        if self._micro_step == self.grad_accum_steps:
            self._position += self.global_batch_size
            self._micro_step = 0
        return _batch(self._sequences, rows, self._cp_rank, self._cp_size)


class EvalLoader:
    """This rank's held-out micro-batches in a fixed order, of the same number on every rank.

    The last batches are filled up with rows whose labels are all -100, which count for nothing.
    """

    def __init__(
        self,
        sequences: Sequences,
        *,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        cp_rank: int = 0,
        cp_size: int = 1,
    ) -> None:
        _check_ranks(dp_rank, dp_size, cp_rank, cp_size, sequences.seq_len)
        self._sequences = sequences
        self.batch_size = micro_batch_size
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._cp_rank, self._cp_size = cp_rank, cp_size

    def __len__(self) -> int:
        return math.ceil(len(self._sequences) / (self.batch_size * self._dp_size))

    def __iter__(self) -> Iterator[Batch]:
        """Yield this rank's batches from the start."""
        total = len(self._sequences)
        for number in range(len(self)):
            start = (number * self._dp_size + self._dp_rank) * self.batch_size
            rows = np.arange(start, start + self.batch_size)
            batch = _batch(self._sequences, rows % total, self._cp_rank, self._cp_size)
            batch["shift_labels"][torch.from_numpy(rows >= total)] = IGNORE
            yield batch


def _check_ranks(dp_rank: int, dp_size: int, cp_rank: int, cp_size: int, seq_len: int) -> None:
    if not (0 <= dp_rank < dp_size and 0 <= cp_rank < cp_size):
        raise ValueError(f"rank dp {dp_rank} of {dp_size}, cp {cp_rank} of {cp_size}")
    if seq_len % cp_size:
        raise ValueError(f"seq_len {seq_len} does not divide into {cp_size} parts")


def _batch(sequences: Sequences, rows: npt.NDArray[np.int64], cp_rank: int, cp_size: int) -> Batch:
    width = sequences.seq_len // cp_size
    part = slice(cp_rank * width, (cp_rank + 1) * width)
    laid_out = sequences.rows(rows)

    def mine(array: npt.NDArray[np.int32]) -> torch.Tensor:
        return torch.from_numpy(array[:, part].astype(np.int64))

    return {
        "input_ids": mine(laid_out.input_ids),
        "position_ids": mine(laid_out.position_ids),
        "shift_labels": mine(laid_out.shift_labels),
        "full_document_ids": torch.from_numpy(laid_out.document_ids),
    }
