"""Turn a row into text, and say which of its characters are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from autotune.errors import AutotuneError, nearest
from autotune.runner.data.rows import Row
from autotune.spec.training import DatasetSource

FORMATS = ("completion", "alpaca", "chat_template")

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML, for a tokenizer that brings no template of its own."""

_ALPACA = "Below is an instruction that describes a task{with_input}. " \
    "Write a response that appropriately completes the request.\n\n" \
    "### Instruction:\n{instruction}\n\n{input_block}### Response:\n"  # fmt: skip
"""The prompt of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca), as Axolotl writes it."""

_ROLES = ("system", "user", "assistant", "tool")
_MARK = "\U0010fffe"
"""A noncharacter, so that no real answer shares its first or last character."""


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
    """A trained end-of-turn token is there already, so no end-of-sequence token is added."""
    adds_bos: bool = True
    """False where the template writes the beginning-of-sequence token itself."""


def check_format(source: DatasetSource) -> None:
    """Refuse a format or an option that would not have the effect its author expects.

    Raises:
        AutotuneError: an unknown `type`, or a key of a `datasets:` entry that is not read here.
    """
    if source.type not in FORMATS:
        raise AutotuneError(
            f"Data set type {source.type!r} ({source.path}) is not known; "
            f"allowed: {', '.join(FORMATS)}.{nearest(source.type, FORMATS)}"
        )
    unread = sorted(source.model_extra or ())
    if unread:
        known = list(DatasetSource.model_fields)
        raise AutotuneError(
            f"Keys of the datasets entry {source.path} that have no effect here: "
            f"{', '.join(unread)}. Known keys: {', '.join(known)}.{nearest(unread[0], known)}"
        )


def raw_texts(row: Row, source: DatasetSource) -> list[str]:
    """Return the row's text without a tokenizer's template; a vocabulary is trained on it."""
    if source.type == "chat_template":
        return [f"{message['role']}\n{message['content']}" for message in _messages(row, source)]
    rendered = completion(row, source) if source.type == "completion" else alpaca(row)
    return [piece.text for piece in rendered.pieces]


def render(row: Row, source: DatasetSource, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """Write a row as its format says.

    Raises:
        AutotuneError: missing columns, a value that is not text, an unknown role, a conversation
            the chat template refuses.
    """
    if source.type == "completion":
        return completion(row, source)
    if source.type == "alpaca":
        return alpaca(row)
    return chat(row, source, tokenizer)


def completion(row: Row, source: DatasetSource) -> Rendered:
    """Train on the whole text."""
    return Rendered(pieces=(Piece.whole(_text(row, source.field or "text", source.type)),))


def alpaca(row: Row) -> Rendered:
    """Train on the output alone; without an input the prompt is Alpaca's shorter one."""
    instruction = _text(row, "instruction", "alpaca")
    output = _text(row, "output", "alpaca")
    given = _text(row, "input", "alpaca") if row.values.get("input") else ""
    prompt = _ALPACA.format(
        with_input=", paired with an input that provides further context" if given else "",
        instruction=instruction,
        input_block=f"### Input:\n{given}\n\n" if given else "",
    )
    return Rendered(pieces=(Piece(text=prompt, trained=()), Piece.whole(output)))


def chat(row: Row, source: DatasetSource, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """Train on each assistant message and on the end-of-turn token behind it.

    A message is found by writing the conversation once more with a mark in its place: what differs
    is the message. So any template works, also one that writes earlier turns otherwise than the
    last (Qwen3 drops their reasoning), for which the text up to a turn is no prefix of the whole.
    """
    messages = _messages(row, source)
    template = tokenizer.chat_template or CHATML_TEMPLATE
    try:
        text = _apply(tokenizer, template, messages)
        spans = [
            _message_span(tokenizer, template, messages, index, text)
            for index, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
    except TemplateError as error:
        raise AutotuneError(
            f"{row.where}: the chat template refuses the conversation: {error}"
        ) from error
    stops = sorted({*tokenizer.get_added_vocab(), "<|im_end|>"}, key=len, reverse=True)
    with_stops = [(start, _behind_stop(text, end, stops)) for start, end in spans]
    # An end-of-sequence token is an answer's own: never put one behind a user's message.
    ends_itself = messages[-1]["role"] != "assistant" or with_stops[-1][1] > spans[-1][1]
    trained = tuple(span for span in with_stops if span[1] > span[0])
    piece = Piece(text=text, trained=trained)
    return Rendered(pieces=(piece,), ends_itself=ends_itself, adds_bos=False)


def _apply(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: Sequence[dict[str, Any]]
) -> str:
    return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)


def _message_span(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    messages: Sequence[dict[str, Any]],
    index: int,
    text: str,
) -> tuple[int, int]:
    marked = [*messages[:index], {**messages[index], "content": _MARK}, *messages[index + 1 :]]
    other = _apply(tokenizer, template, marked)
    start = _shared_start(text, other)
    tail = _shared_start(text[start:][::-1], other[start:][::-1])
    return start, len(text) - tail


def _shared_start(one: str, other: str) -> int:
    """Return the length of the common prefix, by bisection: comparing slices is fast."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[:middle] == other[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _behind_stop(text: str, end: int, stops: Sequence[str]) -> int:
    """Return the position behind the stop token at `end`; a template may put a space before it."""
    rest = text[end:].lstrip()
    for stop in stops:
        if rest.startswith(stop):
            return len(text) - len(rest) + len(stop)
    return end


def _messages(row: Row, source: DatasetSource) -> list[dict[str, Any]]:
    column = source.field_messages or "messages"
    _need(row, column, source.type)
    messages = row.values[column]
    if not isinstance(messages, list) or not messages:
        raise AutotuneError(f"{row.where}: column {column!r} is not a list of messages.")
    for number, message in enumerate(messages, start=1):
        where = f"{row.where}: message {number}"
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            found = ", ".join(message) if isinstance(message, dict) else type(message).__name__
            raise AutotuneError(f"{where} needs the keys role, content; found: {found}.")
        if message["role"] not in _ROLES:
            raise AutotuneError(
                f"{where} has the role {message['role']!r}; allowed: {', '.join(_ROLES)}."
            )
        if not isinstance(message["content"], str):
            raise AutotuneError(
                f"{where} has a content of type {type(message['content']).__name__}, not text."
            )
    return messages


def _text(row: Row, column: str, kind: str) -> str:
    _need(row, column, kind)
    value = row.values[column]
    if not isinstance(value, str):
        raise AutotuneError(
            f"{row.where}: column {column!r} holds {type(value).__name__}, not text."
        )
    return value


def _need(row: Row, column: str, kind: str) -> None:
    if column not in row.values:
        hint = {
            "completion": " Set `field` to the column that holds the text.",
            "chat_template": " Set `field_messages` to the column that holds the messages.",
        }.get(kind, "")
        raise AutotuneError(
            f"{row.where}: a data set of type {kind} needs the column {column!r}; "
            f"found: {', '.join(row.values) or 'none'}.{hint}"
        )
