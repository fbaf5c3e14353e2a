"""A document as text that knows which of its characters are trained on."""

from __future__ import annotations

from dataclasses import dataclass

from autotune.errors import AutotuneError
from autotune.runner.data.readers import Row


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Text that is tokenised as one; only tokens that touch a trained span are labelled."""

    text: str
    trained: tuple[tuple[int, int], ...]
    """Spans of characters, ascending, end exclusive."""

    @classmethod
    def whole(cls, text: str) -> Piece:
        """Train on all of it."""
        return cls(text=text, trained=((0, len(text)),))


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendered:
    """One document as text."""

    pieces: tuple[Piece, ...]
    """Tokenised apart and joined: a prompt gets the tokens it has when it stands alone."""
    ends_itself: bool = False
    """No end-of-sequence token is added: the format has an end of its own, or wants none."""
    adds_bos: bool = True
    """False where the text has the beginning-of-sequence token itself, or wants none."""


def text_of(row: Row, column: str, kind: str) -> str:
    """Return the text of a column.

    Raises:
        AutotuneError: no such column (with those found), or a value that is not text.
    """
    need_column(row, column, kind)
    value = row.values[column]
    if not isinstance(value, str):
        raise AutotuneError(
            f"{row.where}: column {column!r} holds {type(value).__name__}, not text."
        )
    return value


def need_column(row: Row, column: str, kind: str) -> None:
    """Raise an `AutotuneError` unless the row has the column."""
    if column not in row.values:
        hint = {
            "completion": " Set `field` to the column that holds the text.",
            "chat_template": " Set `field_messages` to the column that holds the messages.",
        }.get(kind, "")
        raise AutotuneError(
            f"{row.where}: a data set of type {kind} needs the column {column!r}; "
            f"found: {', '.join(row.values) or 'none'}.{hint}"
        )
