"""Tokenised documents with their labels."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from autotune.errors import AutotuneError
from autotune.runner.data.formats import make_writer, raw_texts
from autotune.runner.data.rows import read_rows
from autotune.runner.data.text import Piece, Rendered
from autotune.spec.training import DatasetSource, DataSettings
from autotune.trial.data_counts import SourceCounts

IGNORE = -100
"""The label of a token that no loss is taken on."""

_BATCH_ROWS = 512
_BATCH_CHARACTERS = 2**16
"""Text tokenised at once: bounds what a batch takes, whatever the length of its rows."""
_VOCABULARY_CHARACTERS = 2**28
"""Text a vocabulary is trained on at most."""
_UNTRAINED = "nothing to train on"
_DUPLICATE = "a duplicate"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Document:
    """One tokenised document."""

    input_ids: npt.NDArray[np.int32]
    trained: npt.NDArray[np.bool_]
    """Which tokens are their own labels; the others are not trained on."""

    @property
    def labels(self) -> npt.NDArray[np.int32]:
        """Not shifted: a token's label is the token itself, or -100."""
        return np.where(self.trained, self.input_ids, IGNORE).astype(np.int32)

    @property
    def num_trained(self) -> int:
        """Tokens the loss is taken on; nothing predicts the first."""
        return int(self.trained[1:].sum())

    def part(self, start: int, stop: int) -> Document:
        """Return some of its tokens as a document."""
        return Document(input_ids=self.input_ids[start:stop], trained=self.trained[start:stop])


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """When enough of a data set is read; None is no limit."""

    tokens: int | None = None
    documents: int | None = None

    def reached(self, tokens: int, documents: int) -> bool:
        """Say whether no more is needed."""
        return (self.tokens is not None and tokens >= self.tokens) or (
            self.documents is not None and documents >= self.documents
        )


def raw_text_of(sources: Iterable[DatasetSource], *, streaming: bool = False) -> Iterator[str]:
    """Yield the text to train a tokenizer on: all, or the first 2**28 characters."""
    characters = 0
    for source in sources:
        for row in read_rows(source, streaming=streaming):
            for text in raw_texts(row, source):
                yield text
                characters += len(text)
            if characters >= _VOCABULARY_CHARACTERS:
                return


class DocumentReader:
    """Reads, renders and tokenises data sets, and counts what becomes of their rows.

    A document ends with the end-of-sequence token, a conversation with its template's end of turn.
    A completion longer than a sequence is cut into chunks. Any other row that is longer is left out
    by default (half an answer would teach the model to stop there); these are Axolotl's defaults.
    Rows without a token to train on are left out.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, settings: DataSettings, *, max_tokens: int
    ) -> None:
        """`max_tokens`: length of a sequence."""
        self._tokenizer = tokenizer
        self._settings = settings
        self._max_tokens = max_tokens
        self._seen: set[bytes] | None = set() if settings.exact_deduplication else None
        self._bos = _bos(tokenizer)

    def read(self, source: DatasetSource, counts: SourceCounts, limit: Limit) -> Iterator[Document]:
        """Yield the documents of one data set in order; `counts` is kept up to date.

        Raises:
            AutotuneError: bad data, or no document is left.
        """
        writer = make_writer(
            source, self._tokenizer, train_on_inputs=self._settings.train_on_inputs
        )
        documents = 0
        batch: list[tuple[str, Rendered]] = []
        characters = 0
        rows = read_rows(source, streaming=self._settings.streaming)
        for row in rows:
            rendered = writer(row)
            _check_text(row.where, rendered)
            batch.append((row.where, rendered))
            characters += sum(len(piece.text) for piece in rendered.pieces)
            if len(batch) < _BATCH_ROWS and characters < _BATCH_CHARACTERS:
                continue
            for document in self._kept(source, batch, counts):
                documents += 1
                yield document
            batch, characters = [], 0
            if limit.reached(counts.tokens, documents):
                counts.complete = next(rows, None) is None
                break
        for document in self._kept(source, batch, counts):
            documents += 1
            yield document
        if counts.rows == 0:
            raise AutotuneError(f"The data set {source.path} is empty.")
        if documents == 0 and set(counts.dropped) != {_DUPLICATE}:
            self._raise_nothing_left(source, counts)

    def _kept(
        self, source: DatasetSource, batch: list[tuple[str, Rendered]], counts: SourceCounts
    ) -> Iterator[Document]:
        tokenised = self._tokenise([rendered for _, rendered in batch])
        for (where, _), document in zip(batch, tokenised, strict=True):
            counts.rows += 1
            for part in self._parts(source, where, document, counts):
                counts.tokens += len(part.input_ids)
                counts.trained_tokens += part.num_trained
                yield part

    def _parts(
        self, source: DatasetSource, where: str, document: Document, counts: SourceCounts
    ) -> list[Document]:
        """Return what is kept of a row: one document, none, or the chunks of a completion."""
        length, longest = len(document.input_ids), self._max_tokens
        if self._seen is not None and self._is_known(document):
            counts.drop(_DUPLICATE)
            return []
        if source.type == "completion":
            bounds = [*range(0, length, longest), length]
            if length > longest and length % longest == 1:
                bounds[-2] -= 1  # a last token alone has nothing to be predicted from
            chunks = [document.part(start, end) for start, end in pairwise(bounds)]
            kept = [chunk for chunk in chunks if chunk.num_trained]
            if not kept:
                counts.drop(_UNTRAINED)
            return kept
        if length > longest:
            strategy = self._settings.excess_length_strategy
            if strategy == "raise":
                raise AutotuneError(
                    f"{where} has {length} tokens, more than the sequence's {longest}. Raise the "
                    "sequence length, or set excess_length_strategy to drop or truncate."
                )
            if strategy == "drop":
                counts.drop(f"longer than {longest} tokens")
                return []
            document = document.part(0, longest)
            counts.truncated += document.num_trained > 0
        if not document.num_trained:
            counts.drop(_UNTRAINED)
            return []
        return [document]

    def _is_known(self, document: Document) -> bool:
        assert self._seen is not None
        whole = hashlib.blake2b(document.input_ids.tobytes(), digest_size=16)
        whole.update(document.trained.tobytes())
        known = whole.digest() in self._seen
        self._seen.add(whole.digest())
        return known

    def _raise_nothing_left(self, source: DatasetSource, counts: SourceCounts) -> None:
        reasons = ", ".join(
            f"{count} of {counts.rows} {'have' if reason == _UNTRAINED else 'are'} {reason}"
            for reason, count in counts.dropped.items()
        )
        kind = source.type if isinstance(source.type, str) else "of its own"
        raise AutotuneError(
            f"No row of {source.path} can be trained on: {reasons} (type {kind}). "
            "Raise the sequence length or check the data."
        )

    def _tokenise(self, rendered: list[Rendered]) -> Iterator[Document]:
        """Tokenise all pieces in one call."""
        pieces = [piece for document in rendered for piece in document.pieces]
        if not pieces:
            return
        encoded = self._tokenizer(
            [piece.text for piece in pieces],
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=any(_is_mixed(piece) for piece in pieces),
            verbose=False,
        )
        eos = self._tokenizer.eos_token_id
        position = 0
        for document in rendered:
            ids = list(self._bos) if document.adds_bos else []
            trained = [np.zeros(len(ids), dtype=bool)]
            for piece in document.pieces:
                mine = encoded["input_ids"][position]
                ids += mine
                offsets = encoded["offset_mapping"][position] if _is_mixed(piece) else None
                trained.append(_trained(piece, len(mine), offsets))
                position += 1
            if not document.ends_itself and (not ids or ids[-1] != eos):
                ids.append(eos)
                # The end of an answer that is not there is no answer.
                trained.append(np.full(1, any(part.any() for part in trained)))
            yield Document(
                input_ids=np.asarray(ids, dtype=np.int32), trained=np.concatenate(trained)
            )


def _check_text(where: str, rendered: Rendered) -> None:
    try:
        for piece in rendered.pieces:
            piece.text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise AutotuneError(
            f"{where} holds half of a surrogate pair (\\ud800 to \\udfff), which is no character. "
            "Remove it."
        ) from error


def _bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the beginning-of-sequence token if this tokenizer puts one before a text."""
    ids = tokenizer("a", verbose=False)["input_ids"]
    return ids[:1] if ids[0] == tokenizer.bos_token_id else []


def _is_mixed(piece: Piece) -> bool:
    """Say whether some of the text is trained on and some is not."""
    return piece.trained not in ((), ((0, len(piece.text)),))


def _trained(
    piece: Piece, num_tokens: int, offsets: list[tuple[int, int]] | None
) -> npt.NDArray[np.bool_]:
    """Return which tokens touch a trained span."""
    if offsets is None:
        return np.full(num_tokens, bool(piece.trained))
    spans = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    starts, ends = spans[:, 0], spans[:, 1]
    # GPT-2's kind of tokenizer states the place of a token without the spaces around it, so a token
    # of spaces has no width; it stands for what lies between its neighbours.
    before = np.concatenate([[0], np.maximum.accumulate(ends)[:-1]])
    starts = np.where(starts == ends, np.minimum(starts, before), starts)
    trained = np.zeros(num_tokens, dtype=bool)
    for start, end in piece.trained:
        trained |= (ends > start) & (starts < end)
    return trained
