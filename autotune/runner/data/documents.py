"""Tokenised documents with their labels."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from autotune.errors import AutotuneError
from autotune.runner.data.formats import Piece, Rendered, check_format, raw_texts, render
from autotune.runner.data.rows import read_rows
from autotune.spec.training import DatasetSource

IGNORE = -100
"""The label of a token that no loss is taken on."""

_ROWS_AT_ONCE = 512
_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Document:
    """One tokenised document."""

    input_ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    """Not shifted: a token's label is the token itself, or -100 where it is not trained on."""


def raw_text_of(sources: Iterable[DatasetSource]) -> Iterator[str]:
    """Yield all text of the data sets, in order, to train a tokenizer on."""
    for source in sources:
        check_format(source)
        for row in read_rows(source):
            yield from raw_texts(row, source)


def load_documents(
    sources: Iterable[DatasetSource], tokenizer: PreTrainedTokenizerBase, *, max_tokens: int
) -> list[Document]:
    """Read, render and tokenise the data sets, in order.

    A document ends with the end-of-sequence token, a conversation with its template's end of turn.
    What is longer than `max_tokens` is cut into chunks where it is plain text and left out
    otherwise (half an answer would teach the model to stop there); these are Axolotl's defaults.
    Documents without a token to train on are left out.

    Raises:
        AutotuneError: bad data, or no document is left.
    """
    documents: list[Document] = []
    for source in sources:
        check_format(source)
        too_long = untrained = 0
        rows = 0
        for batch in _batches(read_rows(source), _ROWS_AT_ONCE):
            rows += len(batch)
            rendered = [render(row, source, tokenizer) for row in batch]
            for document in _tokenise(rendered, tokenizer):
                if source.type == "completion":
                    parts = _chunks(document, max_tokens)
                elif len(document.input_ids) > max_tokens:
                    too_long += 1
                    continue
                else:
                    parts = [document]
                trained = [part for part in parts if (part.labels[1:] != IGNORE).any()]
                untrained += not trained
                documents += trained
        if rows == 0:
            raise AutotuneError(f"The data set {source.path} is empty.")
        if too_long + untrained == rows:
            raise AutotuneError(
                f"No row of {source.path} can be trained on: {too_long} of {rows} are longer than "
                f"{max_tokens} tokens, {untrained} have nothing to train on "
                f"(type {source.type}). Raise the sequence length or check the data."
            )
        if too_long or untrained:
            _log.warning(
                "%s: left out %d of %d rows longer than %d tokens and %d with nothing to train on",
                source.path, too_long, rows, max_tokens, untrained,
            )  # fmt: skip
    return documents


def _batches(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _tokenise(rendered: list[Rendered], tokenizer: PreTrainedTokenizerBase) -> Iterator[Document]:
    """Tokenise all pieces in one call, which `tokenizers` spreads over the cores."""
    pieces = [piece for document in rendered for piece in document.pieces]
    encoded = tokenizer(
        [piece.text for piece in pieces],
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    bos = _bos(tokenizer)
    position = 0
    for document in rendered:
        ids = list(bos) if document.adds_bos else []
        labels = [IGNORE] * len(ids)
        for piece in document.pieces:
            ids += encoded["input_ids"][position]
            labels += _labels(
                piece, encoded["input_ids"][position], encoded["offset_mapping"][position]
            )
            position += 1
        if not document.ends_itself and (not ids or ids[-1] != tokenizer.eos_token_id):
            ids.append(tokenizer.eos_token_id)
            labels.append(tokenizer.eos_token_id)
        yield Document(
            input_ids=np.asarray(ids, dtype=np.int32), labels=np.asarray(labels, dtype=np.int32)
        )


def _bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the beginning-of-sequence token if this tokenizer puts one before a text."""
    ids = tokenizer("a", verbose=False)["input_ids"]
    return ids[:1] if ids[0] == tokenizer.bos_token_id else []


def _labels(piece: Piece, ids: list[int], offsets: list[tuple[int, int]]) -> list[int]:
    labels = []
    spans = iter(piece.trained)
    span = next(spans, None)
    for token, (start, end) in zip(ids, offsets, strict=True):
        while span is not None and start >= span[1]:
            span = next(spans, None)
        trained = span is not None and end > span[0] and end > start
        labels.append(token if trained else IGNORE)
    return labels


def _chunks(document: Document, max_tokens: int) -> list[Document]:
    return [
        Document(
            input_ids=document.input_ids[start : start + max_tokens],
            labels=document.labels[start : start + max_tokens],
        )
        for start in range(0, len(document.input_ids), max_tokens)
    ]
