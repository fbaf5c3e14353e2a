"""Which rank reads what, over many ways to split one global batch."""

import itertools

import numpy as np
import pytest
import torch

from autotune.runner.data.loader import EvalLoader, RankLoader, StepOrder, steps_for_epochs
from autotune.runner.data.packing import Rows

pytestmark = pytest.mark.integration

SEQ_LEN = 8
SPLITS = [
    (mbs, accum, dp, cp)
    for mbs, accum, dp, cp in itertools.product((1, 2, 3, 4), (1, 2, 3, 5), (1, 2, 4), (1, 2, 4))
]


class Table(Rows):
    """Sequences that are laid out already."""

    seq_len = SEQ_LEN

    def __len__(self):
        return len(self.input_ids)

    def rows(self, indices):
        names = ("input_ids", "position_ids", "shift_labels", "document_ids", "lengths")
        return Rows(**{name: getattr(self, name)[indices] for name in names})


def sequences(num):
    """Token ids name their sequence and place: ``100 * sequence + place``."""
    tokens = (np.arange(num)[:, None] * 100 + np.arange(SEQ_LEN)[None]).astype(np.int32)
    return Table(
        input_ids=tokens,
        position_ids=np.tile(np.arange(SEQ_LEN, dtype=np.int32), (num, 1)),
        shift_labels=tokens + 1,
        document_ids=tokens + 2,
        lengths=np.full(num, SEQ_LEN, dtype=np.int32),
    )


def loader(data, order, mbs, accum, dp_rank, dp, cp_rank, cp, **more):
    return RankLoader(
        data,
        order,
        micro_batch_size=mbs,
        grad_accum_steps=accum,
        dp_rank=dp_rank,
        dp_size=dp,
        cp_rank=cp_rank,
        cp_size=cp,
        **more,
    )


def rows_of(batch):
    return (batch["input_ids"][:, 0] // 100).tolist()


@pytest.mark.parametrize(("mbs", "accum", "dp", "cp"), SPLITS)
def test_ranks_together_read_exactly_the_global_batch(mbs, accum, dp, cp):
    data = sequences(17)
    order = StepOrder(17, mbs * accum * dp, seed=3)
    ranks = {
        (d, c): iter(loader(data, order, mbs, accum, d, dp, c, cp))
        for d in range(dp)
        for c in range(cp)
    }
    for step in range(4):
        read = []
        for _ in range(accum):
            for d in range(dp):
                parts = [next(ranks[d, c]) for c in range(cp)]
                tokens = torch.cat([part["input_ids"] for part in parts], dim=1)
                rows = (tokens[:, 0] // 100).tolist()
                for key, expected in {
                    "input_ids": data.input_ids,
                    "shift_labels": data.shift_labels,
                    "position_ids": data.position_ids,
                }.items():
                    whole = torch.cat([part[key] for part in parts], dim=1)
                    assert whole.dtype == torch.int64
                    assert (whole.numpy() == expected[rows]).all()
                for part in parts:
                    assert part["input_ids"].shape == (mbs, SEQ_LEN // cp)
                    assert part["full_document_ids"].dtype == torch.int32
                    assert (part["full_document_ids"].numpy() == data.document_ids[rows]).all()
                read += rows
        assert read == order.step(step).tolist()


def test_an_epoch_reads_every_sequence_once_and_the_next_in_another_order():
    order = StepOrder(10, 4, seed=0)
    stream = np.concatenate([order.step(step) for step in range(10)])
    epochs = stream.reshape(4, 10)
    for epoch in epochs:
        assert sorted(epoch) == list(range(10))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert StepOrder(10, 4, seed=1).take(0, 10).tolist() != epochs[0].tolist()
    assert StepOrder(10, 4, seed=0).step(7).tolist() == stream[28:32].tolist()


def test_order_without_shuffling_and_with_a_batch_above_an_epoch():
    order = StepOrder(3, 7, seed=0, shuffle=False)
    assert order.step(0).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert order.step(1).tolist() == [1, 2, 0, 1, 2, 0, 1]


def test_a_resumed_loader_goes_on_exactly():
    data, order = sequences(13), StepOrder(13, 8, seed=5)
    whole = iter(loader(data, order, 2, 2, 1, 2, 0, 1))
    for _ in range(5 * 2):
        next(whole)
    resumed = iter(loader(data, order, 4, 1, 1, 2, 0, 1, start_step=5))
    expected = order.step(5)
    assert rows_of(next(whole)) + rows_of(next(whole)) == [*expected[2:4], *expected[6:8]]
    assert rows_of(next(resumed)) == expected[4:8].tolist()


def test_position_belongs_to_the_loader_and_survives_a_new_split():
    data, order = sequences(50), StepOrder(50, 4, seed=5)
    ranks = [loader(data, order, 1, 2, d, 2, 0, 1) for d in range(2)]
    read = []

    def step():
        for _ in range(ranks[0].grad_accum_steps):
            for rank in ranks:
                read.extend(rows_of(next(iter(rank))))

    step()
    for rank in ranks:
        rank.reconfigure(3, 1)
        assert rank.global_batch_size == 6
    step()
    for rank in ranks:
        rank.reconfigure(2, 2)
    step()
    assert read == order.take(0, 4 + 6 + 8).tolist()


def test_no_new_split_within_a_step():
    rank = loader(sequences(8), StepOrder(8, 4, seed=0), 2, 2, 0, 1, 0, 1)
    next(iter(rank))
    with pytest.raises(ValueError, match="between steps"):
        rank.reconfigure(1, 4)


@pytest.mark.parametrize(
    "bad", [{"dp_rank": 2, "dp": 2}, {"cp_rank": 1, "cp": 1}, {"cp_rank": 0, "cp": 3}]
)
def test_impossible_ranks_are_refused(bad):
    ranks = {"dp_rank": 0, "dp": 1, "cp_rank": 0, "cp": 1} | bad
    with pytest.raises(ValueError, match=r"rank|divide"):
        loader(sequences(8), StepOrder(8, 4, seed=0), 1, 1, **ranks)


@pytest.mark.parametrize("num", [1, 5, 8, 9])
@pytest.mark.parametrize(("mbs", "dp", "cp"), [(1, 1, 1), (2, 2, 1), (3, 2, 2), (4, 4, 4)])
def test_evaluation_counts_each_sequence_once_in_equal_batches(num, mbs, dp, cp):
    data = sequences(num)
    labels, counts = [], set()
    for d, c in itertools.product(range(dp), range(cp)):
        batches = EvalLoader(
            data, micro_batch_size=mbs, dp_rank=d, dp_size=dp, cp_rank=c, cp_size=cp
        )
        got = list(batches)
        counts.add(len(got))
        assert len(got) == len(batches)
        for batch in got:
            assert batch["input_ids"].shape == (mbs, SEQ_LEN // cp)
            valid = batch["shift_labels"] != -100
            assert (batch["shift_labels"][valid] == batch["input_ids"][valid] + 1).all()
            labels += batch["shift_labels"][valid].tolist()
    assert len(counts) == 1
    assert sorted(labels) == sorted(data.shift_labels.ravel().tolist())
    assert (data.shift_labels != -100).all(), "padding must not write into the sequences"


@pytest.mark.parametrize(
    ("num", "batch", "epochs", "steps"),
    [(100, 10, 1, 10), (101, 10, 1, 11), (100, 10, 2.5, 25), (3, 64, 1, 1), (100, 10, 0.3, 3)],
)
def test_steps_for_epochs(num, batch, epochs, steps):
    assert steps_for_epochs(num, batch, epochs) == steps
