"""Chat templates that ship, and which one a data set is written with."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from transformers import PreTrainedTokenizerBase

from autotune.errors import AutotuneError, nearest
from autotune.spec.training import DatasetSource

END_OF_TURN = {
    "chatml": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "phi_3": "<|end|>",
}
"""What ends a turn in each template that ships; see the models' own cards: Qwen's ChatML,
Llama 3's prompt format, Gemma's formatting, Phi-3's chat format."""

_OWN = "tokenizer_default"
_OWN_OR = "tokenizer_default_fallback_"


@cache
def shipped_template(name: str) -> str:
    """Return the text of a template of `END_OF_TURN`."""
    # Without the file's last line end, which would be written behind the conversation.
    return (files(__package__) / f"{name}.jinja").read_text("utf-8").removesuffix("\n")


def template_of(source: DatasetSource, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of the template the data set asks for, or else the tokenizer's own.

    Raises:
        AutotuneError: an unknown name, `jinja` without a text, or a tokenizer with no template.
    """
    choice = source.chat_template or ("jinja" if source.chat_template_jinja else _OWN)
    if choice == "jinja":
        if not source.chat_template_jinja:
            raise AutotuneError(
                f"{source.path}: chat_template: jinja needs chat_template_jinja, the template."
            )
        return source.chat_template_jinja
    if choice == _OWN or choice.startswith(_OWN_OR):
        own = _own_template(tokenizer)
        if own is not None:
            return own
        choice = choice.removeprefix(_OWN_OR)
        if choice == _OWN:
            raise AutotuneError(
                f"{source.path} holds conversations, and the tokenizer "
                f"{tokenizer.name_or_path!r} has no chat template. Set chat_template to one of "
                f"{', '.join(END_OF_TURN)}, or give one with chat_template_jinja."
            )
    if choice not in END_OF_TURN:
        known = [_OWN, "jinja", *END_OF_TURN]
        raise AutotuneError(
            f"{source.path}: chat_template {choice!r} is not known; allowed: {', '.join(known)}, "
            f"{_OWN_OR}NAME.{nearest(choice, known)} Another one goes into chat_template_jinja."
        )
    return shipped_template(choice)


def _own_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    if not tokenizer.chat_template:
        return None
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:  # several, and none of them the default
        raise AutotuneError(
            f"The tokenizer {tokenizer.name_or_path!r} has several chat templates and no default "
            "one. Give the one you mean with chat_template_jinja."
        ) from error
