"""Documents of random tokens, for a trial without the user's data."""

from __future__ import annotations

import numpy as np

from autotune.runner.data.documents import Document
from autotune.runner.data.packing import Sequences, pack
from autotune.runner.data.store import Documents
from autotune.spec.workload import Workload

_MAX_TOKENS = 2**20
"""16 MiB of arrays in each rank; a longer trial reads them again in another order."""


def synthetic_documents(
    num: int, mean_tokens: int, seq_len: int, vocab_size: int, seed: int
) -> list[Document]:
    """Make documents of random tokens, every one of them labelled.

    Args:
        num: number of documents.
        mean_tokens: mean length before the cut, 2 or more. Lengths are geometric from 2 upwards:
            a document of one token has nothing to predict.
        seq_len: longer documents are cut here.
        vocab_size: token ids are uniform below this.
        seed: equal seeds give equal documents.
    """
    random = np.random.default_rng(seed)
    lengths = np.minimum(1 + random.geometric(1 / (mean_tokens - 1), size=num), seq_len)
    documents = []
    for length in lengths:
        ids = random.integers(vocab_size, size=length, dtype=np.int32)
        documents.append(Document(input_ids=ids, trained=np.ones(length, dtype=bool)))
    return documents


def synthetic_sequences(workload: Workload, vocab_size: int, seed: int) -> Sequences:
    """Make enough sequences for two optimizer steps, or fewer where those would be huge."""
    num = max(1, min(2 * workload.global_batch_size, _MAX_TOKENS // workload.seq_len))
    mean = workload.synthetic_document_tokens
    per_sequence = max(1, round(workload.seq_len / mean)) if workload.packing else 1
    documents = synthetic_documents(num * per_sequence, mean, workload.seq_len, vocab_size, seed)
    return pack(
        Documents.in_memory(documents), workload.seq_len, packing=workload.packing, pad_token_id=0
    )


def filled_sequences(workload: Workload, vocab_size: int, seed: int) -> Sequences:
    """Make sequences of one document each that ends no sooner than the sequence: the worst case."""
    num = max(1, min(2 * workload.global_batch_size, _MAX_TOKENS // workload.seq_len))
    random = np.random.default_rng(seed)
    documents = [
        Document(
            input_ids=random.integers(vocab_size, size=workload.seq_len, dtype=np.int32),
            trained=np.ones(workload.seq_len, dtype=bool),
        )
        for _ in range(num)
    ]
    return pack(Documents.in_memory(documents), workload.seq_len, packing=False, pad_token_id=0)
