"""Instruction data: which columns make up a prompt and how it is written."""

from __future__ import annotations

import string

from autotune.errors import AutotuneError
from autotune.runner.data.readers import Row
from autotune.runner.data.text import Piece, Rendered, text_of
from autotune.spec.training import PromptFormat

_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request."
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request."
)
"""The prompts of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca), as Axolotl writes them."""


def _alpaca(system: str, turn: str, turn_without_input: str, **fields: str) -> PromptFormat:
    return PromptFormat(
        format=system.format(system=_WITH_INPUT) + turn,
        no_input_format=system.format(system=_WITHOUT_INPUT) + turn_without_input,
        field_system="",
        **fields,
    )


_INSTRUCT = (
    "{system}\n\n",
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
    "### Instruction:\n{instruction}\n\n### Response:\n",
)
_CHAT = (
    "SYSTEM: {system}\n",
    "USER: {instruction}\n{input}\nASSISTANT:",
    "USER: {instruction}\nASSISTANT:",
)
_CHATML = (
    "<|im_start|>system\n{system}<|im_end|>\n",
    "<|im_start|>user\n{instruction}\n{input}<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n",
)

PROMPTS: dict[str, PromptFormat] = {
    "alpaca": _alpaca(*_INSTRUCT),
    "alpaca:chat": _alpaca(*_CHAT),
    "alpaca:chatml": _alpaca(*_CHATML),
    "alpaca_chat": _alpaca(*_CHAT),
    "gpteacher": _alpaca(*_INSTRUCT, field_output="response"),
    "alpaca_w_system.load_open_orca": PromptFormat(
        field_system="system_prompt",
        field_instruction="question",
        field_input="",
        field_output="response",
        system_format="### System:\n{system}\n",
        format="### Human:\n{instruction}\n### Additional Context:\n{input}\n### Assistant:\n",
        no_input_format="### Human:\n{instruction}\n### Assistant:\n",
    ),
}
"""Axolotl's names (0.19) and what it writes for them."""


def check_prompt(prompt: PromptFormat, where: str) -> None:
    """Refuse a format with a placeholder nobody fills.

    Raises:
        AutotuneError: names it.
    """
    allowed = {
        "format": {"instruction", "input"},
        "no_input_format": {"instruction"},
        "system_format": {"system"},
    }
    for key, names in allowed.items():
        text = getattr(prompt, key)
        try:
            found = {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
        except ValueError as error:
            raise AutotuneError(
                f"{where}: {key}: {text!r} cannot be read ({error}). "
                "Write {{ and }} for braces that stand for themselves."
            ) from error
        if not found <= names:
            raise AutotuneError(
                f"{where}: {key}: {{{min(found - names)}}} is not filled in; "
                f"allowed: {', '.join(f'{{{name}}}' for name in sorted(names))}. "
                "Write {{ and }} for braces that stand for themselves."
            )


def instruction(row: Row, prompt: PromptFormat, kind: str) -> Rendered:
    """Write a prompt and its answer; the answer alone is trained on."""
    asked = text_of(row, prompt.field_instruction, kind)
    answer = text_of(row, prompt.field_output, kind)
    given = _optional(row, prompt.field_input, kind)
    system = _optional(row, prompt.field_system, kind) or prompt.system_prompt
    if given:
        text = prompt.format.format(instruction=asked, input=given)
    else:
        text = prompt.no_input_format.format(instruction=asked)
    if system:
        text = prompt.system_format.format(system=system) + text
    return Rendered(pieces=(Piece(text=text, trained=()), Piece.whole(answer)))


def _optional(row: Row, column: str, kind: str) -> str:
    return text_of(row, column, kind) if column and row.values.get(column) else ""
