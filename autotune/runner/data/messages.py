"""Read a conversation out of a row: its messages, their roles, which of them are trained on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from autotune.errors import AutotuneError
from autotune.runner.data.readers import Row
from autotune.runner.data.text import need_column
from autotune.spec.training import DatasetSource

_ROLES = ("system", "user", "assistant", "tool")
_OTHER_NAMES = {"human": "user", "gpt": "assistant"}
"""As Axolotl reads them without `roles`."""
Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """What a chat template is given, and which messages are trained on."""

    messages: list[Message]
    trained: list[bool]
    tools: list[Any] | None


def read_conversation(row: Row, source: DatasetSource, *, train_on_inputs: bool) -> Conversation:
    """Read the row's messages in the template's words.

    Properties that are null count as absent: columns of one type have a place for every property.

    Raises:
        AutotuneError: no list of messages, a message without role or text, an unknown role.
    """
    given = _list_of(row, source.field_messages or "messages", source)
    messages, trained = [], []
    for number, values in enumerate(given, start=1):
        where = f"{row.where}: message {number}"
        message = _message(values, source, where)
        said = values.get(source.message_field_training) if source.message_field_training else None
        if said is not None and not isinstance(said, bool):
            raise AutotuneError(
                f"{where}: {source.message_field_training} is {said!r}, not true or false."
            )
        messages.append(message)
        trained.append(_is_trained(message, source, train_on_inputs) if said is None else said)
    system = row.values.get("system")
    if isinstance(system, str) and system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
        trained.insert(0, _is_trained(messages[0], source, train_on_inputs))
    if source.drop_system_message and messages[0]["role"] == "system":
        messages, trained = messages[1:], trained[1:]
    if not messages:
        raise AutotuneError(f"{row.where} holds a system message alone, and it is dropped.")
    return Conversation(messages=messages, trained=trained, tools=_tools(row, source))


def _list_of(row: Row, column: str, source: DatasetSource) -> list[Any]:
    need_column(row, column, str(source.type))
    given = _parsed(row.values[column], f"{row.where}: column {column!r}")
    if not isinstance(given, list) or not given:
        raise AutotuneError(f"{row.where}: column {column!r} is not a list of messages.")
    return given


def _message(values: object, source: DatasetSource, where: str) -> Message:
    if not isinstance(values, dict):
        raise AutotuneError(f"{where} is a {type(values).__name__}, not an object.")
    names = {"role": "role", "content": "content"} | (source.message_property_mappings or {})
    taken = {*names.values(), source.message_field_training}
    message = {key: value for key, value in values.items() if key not in taken}
    message |= {name: values[key] for name, key in names.items() if key in values}
    message = {key: value for key, value in message.items() if value is not None}
    if message.get("tool_calls"):
        message["tool_calls"] = _tool_calls(message["tool_calls"], where)
        message.setdefault("content", "")
    missing = [names[name] for name in ("role", "content") if name not in message]
    if missing:
        raise AutotuneError(
            f"{where} needs the keys {names['role']}, {names['content']}; "
            f"found: {', '.join(key for key, value in values.items() if value is not None)}. "
            "Set message_property_mappings, such as {role: from, content: value}."
        )
    message["role"] = _role(message["role"], source, where)
    if not isinstance(message["content"], str):
        raise AutotuneError(
            f"{where} has a content of type {type(message['content']).__name__}, not text."
        )
    return message


def _role(name: object, source: DatasetSource, where: str) -> str:
    if source.roles:
        by_name = {other: role for role, others in source.roles.items() for other in others}
        known = tuple(dict.fromkeys([*source.roles, *_ROLES]))
    else:
        by_name, known = _OTHER_NAMES, _ROLES
    role = by_name.get(str(name), str(name))
    if role not in known:
        raise AutotuneError(
            f"{where} has the role {name!r}; allowed: {', '.join(known)}. "
            "Map others with roles, such as {assistant: [bot]}."
        )
    return role


def _is_trained(message: Message, source: DatasetSource, train_on_inputs: bool) -> bool:
    given = ["assistant"] if source.roles_to_train is None else source.roles_to_train
    roles = {_role(name, source, f"{source.path}: roles_to_train") for name in given}
    return train_on_inputs or message["role"] in roles


def _tool_calls(calls: object, where: str) -> list[Any]:
    """Decode arguments that are JSON in a string: templates write them as JSON once more."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise AutotuneError(f"{where}: tool_calls is not a list of objects.")
    decoded = []
    for call in calls:
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            arguments = _parsed(function["arguments"], f"{where}: arguments of a tool call")
            call = {**call, "function": {**function, "arguments": arguments}}
        decoded.append(call)
    return decoded


def _tools(row: Row, source: DatasetSource) -> list[Any] | None:
    column = source.field_tools or "tools"
    tools = _parsed(row.values.get(column), f"{row.where}: column {column!r}")
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list):
        raise AutotuneError(f"{row.where}: column {column!r} is not a list of tools.")
    return tools


def _parsed(value: object, where: str) -> object:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise AutotuneError(f"{where} is text that is not JSON: {error.msg}.") from error
