"""Packing against a slow, obvious rewriting of what each array means."""

import numpy as np
import pytest

from autotune.errors import AutotuneError
from autotune.runner.data.documents import Document
from autotune.runner.data.packing import pack, split_validation
from autotune.runner.data.store import Documents
from autotune.runner.data.synthetic import synthetic_documents, synthetic_sequences
from autotune.spec.workload import Workload

pytestmark = pytest.mark.integration

PAD = 7


def every_row(sequences):
    return sequences.rows(range(len(sequences)))


def random_documents(seed, num, longest):
    """Give every token of all documents its own id, so that a lost or moved token is seen."""
    random = np.random.default_rng(seed)
    documents, next_id = [], 100
    for size in random.integers(1, longest + 1, size=num):
        ids = np.arange(next_id, next_id + size, dtype=np.int32)
        documents.append(Document(input_ids=ids, trained=random.random(size) < 0.7))
        next_id += size
    return documents


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_every_array_follows_from_the_documents(seed, packing):
    seq_len = 32
    documents = random_documents(seed, num=60, longest=seq_len)
    packed = pack(Documents.in_memory(documents), seq_len, packing=packing, pad_token_id=PAD)
    sequences = every_row(packed)
    by_first_id = {int(d.input_ids[0]): d for d in documents}
    for row in range(len(packed)):
        position, number = 0, 0
        while position < sequences.lengths[row]:
            document = by_first_id.pop(int(sequences.input_ids[row, position]))
            for offset, token in enumerate(document.input_ids):
                at = (row, position + offset)
                last = offset == len(document.input_ids) - 1
                assert sequences.input_ids[at] == token
                assert sequences.position_ids[at] == offset
                assert sequences.document_ids[at] == number
                expected = -100 if last else document.labels[offset + 1]
                assert sequences.shift_labels[at] == expected
            position, number = position + len(document.input_ids), number + 1
        rest = slice(position, seq_len)
        assert (sequences.input_ids[row, rest] == PAD).all()
        assert (sequences.shift_labels[row, rest] == -100).all()
        assert (sequences.document_ids[row, rest] == number).all()
        assert (sequences.position_ids[row, rest] == np.arange(seq_len - position)).all()
        assert number == 1 or packing
    assert not by_first_id, "every document is in exactly one sequence"
    labels = (sequences.shift_labels != -100).sum(axis=1)
    assert packed.mean_trained_tokens() == pytest.approx(labels.mean())
    some = np.arange(0, len(packed), 2)
    assert packed.take(some).mean_trained_tokens() == pytest.approx(labels[some].mean())


def test_best_fit_fills_where_it_can():
    sizes = [60, 40, 50, 25] * 200  # Fits exactly: 60 + 40, 50 + 50, 4 x 25.
    documents = [
        Document(input_ids=np.arange(s, dtype=np.int32), trained=np.ones(s, dtype=bool))
        for s in sizes
    ]
    packed = pack(Documents.in_memory(documents), 100, packing=True, pad_token_id=PAD)
    assert len(packed) == sum(sizes) // 100
    assert packed.efficiency == 1.0
    alone = pack(Documents.in_memory(documents), 100, packing=False, pad_token_id=PAD)
    assert len(alone) == len(sizes)
    assert alone.efficiency == pytest.approx(0.4375)


def test_best_fit_takes_the_tightest_bin():
    documents = [
        Document(input_ids=np.full(s, s, dtype=np.int32), trained=np.ones(s, dtype=bool))
        for s in (60, 50, 45, 5)
    ]
    packed = pack(Documents.in_memory(documents), 100, packing=True, pad_token_id=PAD)
    # 60 | 50 + 45: the last 5 fit both, and exactly the second; first fit would take the first.
    assert every_row(packed).lengths.tolist() == [60, 100]


def test_packing_is_deterministic():
    documents = random_documents(3, num=200, longest=64)
    held = Documents.in_memory(documents)
    first, second = (pack(held, 64, packing=True, pad_token_id=0) for _ in range(2))
    assert (first.order == second.order).all() and (first.starts == second.starts).all()
    assert first.digest() == second.digest()


def test_documents_that_do_not_fit_are_a_bug():
    with pytest.raises(ValueError, match="1 to 8 tokens"):
        held = Documents.in_memory(random_documents(0, num=5, longest=32))
        pack(held, 8, packing=True, pad_token_id=0)


@pytest.mark.parametrize("mean", [2, 64, 512])
def test_synthetic_lengths_have_the_stated_mean(mean):
    documents = synthetic_documents(4000, mean, 10**6, vocab_size=300, seed=1)
    lengths = np.array([len(d.input_ids) for d in documents])
    # Geometric: the standard deviation is about the mean, so 4000 draws give 1.6%.
    assert lengths.mean() == pytest.approx(mean, rel=0.05)
    assert lengths.min() >= 2
    tokens = np.concatenate([d.input_ids for d in documents])
    assert 0 <= tokens.min() and 290 < tokens.max() < 300
    assert all((d.labels == d.input_ids).all() for d in documents)


def test_synthetic_documents_are_cut_and_follow_the_seed():
    def one(seed):
        return synthetic_documents(50, 512, 100, vocab_size=300, seed=seed)

    assert max(len(d.input_ids) for d in one(0)) == 100
    assert all((a.input_ids == b.input_ids).all() for a, b in zip(one(0), one(0), strict=True))
    assert any(len(a.input_ids) != len(b.input_ids) for a, b in zip(one(0), one(1), strict=True))


@pytest.mark.parametrize("packing", [True, False])
def test_synthetic_sequences_cover_a_step(packing):
    workload = Workload(seq_len=128, global_batch_size=16, packing=packing)
    sequences = synthetic_sequences(workload, vocab_size=300, seed=0)
    assert sequences.seq_len == 128
    assert len(sequences) >= 16
    assert every_row(sequences).document_ids.max() >= (2 if packing else 1)
    assert sequences.efficiency > (0.9 if packing else 0.1)


@pytest.mark.parametrize(("size", "held_out"), [(0, 0), (0.1, 4), (0.001, 1), (1, 1), (5, 5)])
def test_split_holds_out_a_share_or_a_count(size, held_out):
    held = Documents.in_memory(random_documents(0, 40, 16))
    sequences = pack(held, 16, packing=False, pad_token_id=PAD)
    train, validation = split_validation(sequences, size, seed=1)
    assert len(train) == 40 - held_out
    assert (validation is None) == (held_out == 0)
    firsts = list(every_row(train).input_ids[:, 0]) + (
        [] if validation is None else list(every_row(validation).input_ids[:, 0])
    )
    assert sorted(firsts) == sorted(every_row(sequences).input_ids[:, 0])
    if validation is not None:
        assert len(validation) == held_out
        again = split_validation(sequences, size, seed=1)[1]
        assert again.digest() == validation.digest() != train.digest()


@pytest.mark.parametrize("size", [40, 400, 0.999, -1, 1.5])
def test_split_never_empties_the_training_set(size):
    held = Documents.in_memory(random_documents(0, 40, 16))
    sequences = pack(held, 16, packing=False, pad_token_id=PAD)
    with pytest.raises(AutotuneError, match="val_set_size"):
        split_validation(sequences, size, seed=1)
