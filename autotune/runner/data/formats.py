"""Turn a row into text, and say which of its characters are trained on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from transformers import PreTrainedTokenizerBase

from autotune.errors import AutotuneError, nearest
from autotune.runner.data.chat import ChatWriter
from autotune.runner.data.messages import read_conversation
from autotune.runner.data.prompts import PROMPTS, check_prompt, instruction
from autotune.runner.data.readers import Row
from autotune.runner.data.text import Piece, Rendered, need_column, text_of
from autotune.spec.training import DATASET_TYPES, DatasetSource, PromptFormat

Writer = Callable[[Row], Rendered]


def make_writer(
    source: DatasetSource, tokenizer: PreTrainedTokenizerBase, *, train_on_inputs: bool
) -> Writer:
    """Return what writes the rows of a data set as its type says.

    The writer raises `AutotuneError` for missing columns, values that are not text, and
    conversations the template refuses.

    Raises:
        AutotuneError: an unknown type, prompt format or template.
    """
    if source.type == "chat_template":
        return ChatWriter(source, tokenizer, train_on_inputs=train_on_inputs)
    writer = _plain_writer(source)
    if not train_on_inputs:
        return writer
    return lambda row: _all_trained(writer(row))


def raw_texts(row: Row, source: DatasetSource) -> list[str]:
    """Return the row's text without a tokenizer's template; a vocabulary is trained on it."""
    if source.type == "chat_template":
        messages = read_conversation(row, source, train_on_inputs=False).messages
        return [f"{message['role']}\n{message['content']}" for message in messages]
    return [piece.text for piece in _plain_writer(source)(row).pieces]


def _plain_writer(source: DatasetSource) -> Writer:
    """Return the writer of a type that needs no tokenizer."""
    if source.type == "completion":
        return partial(_completion, column=source.field or "text")
    if source.type == "input_output":
        return _input_output
    prompt = _prompt_of(source)
    kind = source.type if isinstance(source.type, str) else "of its own"
    return partial(instruction, prompt=prompt, kind=kind)


def _prompt_of(source: DatasetSource) -> PromptFormat:
    if isinstance(source.type, PromptFormat):
        check_prompt(source.type, f"{source.path}: type")
        return source.type
    if source.type not in PROMPTS:
        raise AutotuneError(
            f"Data set type {source.type!r} ({source.path}) is not known; "
            f"allowed: {', '.join(DATASET_TYPES)}, or a mapping with field_instruction, "
            f"field_output and format.{nearest(source.type, DATASET_TYPES)}"
        )
    return PROMPTS[source.type]


def _completion(row: Row, column: str) -> Rendered:
    """Train on the whole text."""
    return Rendered(pieces=(Piece.whole(text_of(row, column, "completion")),))


def _input_output(row: Row) -> Rendered:
    """Train on the segments labelled true; nothing is added, the segments hold it all."""
    need_column(row, "segments", "input_output")
    segments = row.values["segments"]
    if not isinstance(segments, list) or not segments:
        raise AutotuneError(f"{row.where}: column 'segments' is not a list of segments.")
    pieces = []
    for number, segment in enumerate(segments, start=1):
        where = f"{row.where}: segment {number}"
        if not isinstance(segment, dict) or not {"label", "text"} <= segment.keys():
            found = ", ".join(segment) if isinstance(segment, dict) else type(segment).__name__
            raise AutotuneError(f"{where} needs the keys label, text; found: {found}.")
        label, text = segment["label"], segment["text"]
        if not isinstance(label, bool) or not isinstance(text, str):
            raise AutotuneError(
                f"{where} needs a label of true or false and a text; found: {label!r}, "
                f"{type(text).__name__}."
            )
        pieces.append(Piece.whole(text) if label else Piece(text=text, trained=()))
    return Rendered(pieces=tuple(pieces), ends_itself=True, adds_bos=False)


def _all_trained(rendered: Rendered) -> Rendered:
    return Rendered(
        pieces=tuple(Piece.whole(piece.text) for piece in rendered.pieces),
        ends_itself=rendered.ends_itself,
        adds_bos=rendered.adds_bos,
    )
