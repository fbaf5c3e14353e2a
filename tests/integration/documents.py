"""Helpers of the data tests: read documents as a run does, and show their masks as text."""

from __future__ import annotations

from autotune.runner.data.documents import DocumentReader, Limit
from autotune.spec.training import DatasetSource, DataSettings
from autotune.trial.data_counts import SourceCounts

CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Tell me a story."},
    {"role": "assistant", "content": "The sea is wide."},
    {"role": "user", "content": "The sea is wide."},
    {"role": "assistant", "content": "Tell me."},
]


def read(tokenizer, source, *, max_tokens=1000, limit=None, **settings):
    """Return the documents of a data set and what was counted."""
    counts = SourceCounts(path=source.path, type=str(source.type))
    reader = DocumentReader(tokenizer, DataSettings(**settings), max_tokens=max_tokens)
    return list(reader.read(source, counts, limit or Limit())), counts


def load(tokenizer, path, kind="completion", max_tokens=1000, **keys):
    """Return the documents of one file."""
    return read(tokenizer, DatasetSource(path=path, type=kind, **keys), max_tokens=max_tokens)[0]


def runs(document, tokenizer):
    """Decode the stretches of labelled and of masked tokens: ``[(trained, text), ...]``."""
    found = []
    for token, label in zip(document.input_ids, document.labels, strict=True):
        assert label in (token, -100)
        if not found or found[-1][0] != (label != -100):
            found.append((label != -100, []))
        found[-1][1].append(int(token))
    return [(trained, tokenizer.decode(ids)) for trained, ids in found]


def trained_text(document, tokenizer):
    """Decode the trained stretches alone."""
    return [text for trained, text in runs(document, tokenizer) if trained]
