"""Conversations: which characters of what a chat template writes are trained on."""

from __future__ import annotations

from collections.abc import Sequence

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from autotune.errors import AutotuneError
from autotune.runner.data.messages import Conversation, Message, read_conversation
from autotune.runner.data.readers import Row
from autotune.runner.data.templates import END_OF_TURN, template_of
from autotune.runner.data.text import Piece, Rendered
from autotune.spec.training import DatasetSource

_MARK = "\U0010fffe"
"""A noncharacter, so that no real message shares its first or last character."""
_LONG_MARK = _MARK * 12
_PROVED_ROWS = 16
"""Conversations of a data set for which it is proved that a message changes nothing else."""
Span = tuple[int, int]


class ChatWriter:
    """Writes the conversations of one data set.

    A message is found by writing the conversation once more with a mark in its place, and nothing
    but the mark: what differs is what the message wrote (its reasoning and tool calls, too). So any
    template works, also one that writes earlier turns otherwise than the last (Qwen3 drops their
    reasoning), for which the text up to a turn is no prefix of the whole. Where the messages cannot
    be told apart in this way, the data is refused.
    """

    def __init__(
        self, source: DatasetSource, tokenizer: PreTrainedTokenizerBase, *, train_on_inputs: bool
    ) -> None:
        """Read the template.

        Raises:
            AutotuneError: no such template, or none.
        """
        self._source = source
        self._tokenizer = tokenizer
        self._train_on_inputs = train_on_inputs
        self._template = template_of(source, tokenizer)
        self._stops = self._find_stops()
        self._proved = 0

    def __call__(self, row: Row) -> Rendered:
        """Train on the chosen messages and on the end-of-turn tokens behind them.

        Raises:
            AutotuneError: no conversation, or one that the template refuses or mixes up.
        """
        conversation = read_conversation(row, self._source, train_on_inputs=self._train_on_inputs)
        if any(_MARK in message["content"] for message in conversation.messages):
            raise AutotuneError(f"{row.where} holds U+10FFFE, which is no character. Remove it.")
        try:
            text = self._write(conversation.messages, conversation.tools)
            spans = self._spans(conversation, text, row.where)
        except TemplateError as error:
            raise AutotuneError(
                f"{row.where}: the chat template refuses the conversation: {error}"
            ) from error
        ends = [self._stop_behind(text, span[1]) if span else None for span in spans]
        piece = Piece(text=text, trained=self._trained(conversation.trained, spans, ends))
        # An end-of-sequence token is an answer's own: never put one behind a user's message.
        wants_end = conversation.trained[-1] and self._source.train_on_eos != "none"
        return Rendered(
            pieces=(piece,), ends_itself=not wants_end or ends[-1] is not None, adds_bos=False
        )

    def _write(self, messages: Sequence[Message], tools: list[object] | None = None) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                messages, chat_template=self._template, tools=tools, tokenize=False
            )
        except (ArithmeticError, TypeError, ValueError, RecursionError) as error:
            # What a template computes fails in Python's own words.
            raise TemplateError(f"{type(error).__name__}: {error}") from error

    def _spans(self, conversation: Conversation, text: str, where: str) -> list[Span | None]:
        """Return where each message stands; None for one that leaves no trace and is not trained.

        Raises:
            AutotuneError: a trained message is not written exactly once, or the text that depends
                on one message overlaps that of another.
        """
        if not any(conversation.trained):
            return [None] * len(conversation.messages)
        messages = conversation.messages
        spans: list[Span | None] = []
        before = 0
        for index, message in enumerate(messages):
            mark = {"role": message["role"], "content": _MARK}
            other = self._write(
                [*messages[:index], mark, *messages[index + 1 :]], conversation.tools
            )
            if conversation.trained[index] and self._proved < _PROVED_ROWS:
                self._prove(conversation, index, other, where)
            written = other.count(_MARK)
            if conversation.trained[index] and written != 1:
                raise AutotuneError(
                    f"{where}: the chat template writes message {index + 1} ({message['role']}) "
                    f"{written} times, so its tokens cannot be told. Use a template that writes "
                    "it once, or leave its role out of roles_to_train."
                )
            if other == text:
                spans.append(None)
                continue
            start = _shared_start(text, other)
            end = len(text) - _shared_start(text[start:][::-1], other[start:][::-1])
            if start < before:
                raise AutotuneError(
                    f"{where}: the chat template mixes message {index + 1} ({message['role']}) "
                    "with another, so their tokens cannot be told apart. Use another chat_template."
                )
            spans.append((start, end))
            before = end
        self._proved += 1
        return spans

    def _prove(self, conversation: Conversation, index: int, marked: str, where: str) -> None:
        """Refuse a template that writes something else for another text, such as its length."""
        messages, role = conversation.messages, conversation.messages[index]["role"]
        longer = {"role": role, "content": _LONG_MARK}
        other = self._write([*messages[:index], longer, *messages[index + 1 :]], conversation.tools)
        if other != marked.replace(_MARK, _LONG_MARK):
            raise AutotuneError(
                f"{where}: the chat template writes something that depends on message {index + 1} "
                f"({role}) in another place, so its tokens cannot be told. Use another "
                "chat_template."
            )

    def _trained(
        self, trained: list[bool], spans: list[Span | None], ends: list[Span | None]
    ) -> tuple[Span, ...]:
        which = self._source.train_on_eos or "turn"
        last = max((index for index, is_trained in enumerate(trained) if is_trained), default=-1)
        found = []
        for index, (span, end) in enumerate(zip(spans, ends, strict=True)):
            with_end = end is not None and (
                which == "all"
                or (which == "turn" and trained[index])
                or (which == "last" and index == last)
            )
            if trained[index] and span is not None:
                # What stands between a message and its end (a space in Llama 2) belongs to both.
                found.append((span[0], end[1]) if with_end and end else span)
            elif with_end and end:
                found.append(end)
        return tuple(span for span in found if span[1] > span[0])

    def _stop_behind(self, text: str, end: int) -> Span | None:
        """Return where the end-of-turn token at `end` is; a template may put a space before it."""
        rest = text[end:].lstrip()
        start = len(text) - len(rest)
        stop = next((stop for stop in self._stops if rest.startswith(stop)), None)
        return None if stop is None else (start, start + len(stop))

    def _find_stops(self) -> list[str]:
        """Return the tokens that end a turn: those that stand behind a conversation's last message.

        (What stands between two messages may be the start of the next turn.)
        """
        added = sorted({*self._tokenizer.get_added_vocab(), *END_OF_TURN.values()}, key=len)
        found: dict[str, None] = {}
        question = {"role": "user", "content": _MARK}
        answer = {"role": "assistant", "content": _MARK}
        for messages in ([question, answer], [question]):
            try:
                tail = self._write(messages).rpartition(_MARK)[2].lstrip()
            except TemplateError:  # it wants other conversations; these are for the ends alone
                continue
            found |= {token: None for token in reversed(added) if tail.startswith(token)}
        eos = self._tokenizer.eos_token
        return sorted({*found, eos}, key=len, reverse=True)


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
