"""Data keys of a configuration: `datasets:` and what goes with it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast, get_args

from pydantic import ValidationError

from autotune.config.keys import check_known, key_catalogue
from autotune.config.reading import read_text
from autotune.config.values import Section
from autotune.errors import AutotuneError
from autotune.spec.training import (
    DATASET_TYPES,
    DatasetSource,
    DataSettings,
    PromptFormat,
    TrainOnEnd,
)

_PRETRAINING_KEYS = frozenset(
    {"path", "name", "split", "text_column", "type", "data_files", "skip", "trust_remote_code"}
)
_USED = frozenset(DatasetSource.model_fields) | {"message_field_role", "message_field_content"}
_WITHOUT_EFFECT = frozenset({"preprocess_shards", "trust_remote_code"})
"""Keys that change how Axolotl prepares the data, and not what is trained on."""
_CHAT_KEYS = frozenset({
    "chat_template", "chat_template_jinja", "drop_system_message", "field_messages", "field_tools",
    "message_field_content", "message_field_role", "message_field_training",
    "message_property_mappings", "roles", "roles_to_train", "train_on_eos",
})  # fmt: skip
"""What would have no effect on another type of data."""


def read_datasets(top: Section, key: str, folder: Path, where: str) -> list[DatasetSource]:
    """Read `datasets` or `test_datasets`.

    A relative path is taken from the working directory, as Axolotl does, or else from the
    configuration's folder when the file is there. The top-level `chat_template` holds for entries
    that state none.

    Raises:
        AutotuneError: no list of mappings, an unknown key, or one that is not read here.
    """
    entries = top.raw(key, [])
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise top.error(key, "Write a list of entries, each with path and type.")
    template = top.text("chat_template")
    jinja = _jinja(top.text("chat_template_jinja"), folder)
    sources = []
    for index, entry in enumerate(entries):
        place = f"{where}: {key}[{index}]"
        check_known(entry, key_catalogue().dataset_keys, place)
        source = _dataset(Section(entry, place), entry, folder)
        if source.type == "chat_template" and not (
            source.chat_template or source.chat_template_jinja
        ):
            source = source.model_copy(
                update={"chat_template": template, "chat_template_jinja": jinja}
            )
        sources.append(source)
    return sources


def read_pretraining_datasets(top: Section, folder: Path, where: str) -> list[DatasetSource]:
    """Read `pretraining_dataset`: a path, an entry, or a list of entries, all of them plain text.

    Raises:
        AutotuneError: something else, or an unknown key.
    """
    given = top.raw("pretraining_dataset", [])
    if given and top.has("datasets"):
        raise AutotuneError(f"{where}: datasets and pretraining_dataset exclude each other.")
    entries = given if isinstance(given, list) else [given]
    sources = []
    for index, value in enumerate(entries):
        entry = {"path": value} if isinstance(value, str) else value
        if not isinstance(entry, Mapping):
            raise top.error(
                "pretraining_dataset", "Write a path, or a list of entries with path and split."
            )
        place = f"{where}: pretraining_dataset[{index}]"
        check_known(entry, _PRETRAINING_KEYS, place)
        section = Section(entry, place)
        _refuse_remote_code(section)
        section.text("type", choices=("pretrain", "completion"))
        sources.append(
            DatasetSource(
                path=_path(section, folder),
                name=section.text("name"),
                split=section.text("split", "train"),
                field=section.text("text_column"),
                data_files=_texts(section, "data_files"),
                skip=section.integer("skip"),
            )
        )
    return sources


def read_data_settings(top: Section) -> DataSettings:
    """Read the top-level keys that hold for all data sets."""
    strategy = top.text("excess_length_strategy", "drop", choices=("drop", "truncate", "raise"))
    return DataSettings(
        train_on_inputs=top.boolean("train_on_inputs", False),
        excess_length_strategy=cast(Literal["drop", "truncate", "raise"], strategy),
        exact_deduplication=top.boolean("dataset_exact_deduplication", False),
        streaming=top.boolean("streaming", False) or bool(top.raw("pretraining_dataset")),
    )


def _dataset(section: Section, entry: Mapping[str, Any], folder: Path) -> DatasetSource:
    _refuse_remote_code(section)
    kind = _type(section)
    given = {name for name, value in entry.items() if value is not None}
    unused = given - _USED - _WITHOUT_EFFECT
    if kind != "chat_template":
        unused |= given & _CHAT_KEYS
    if kind != "completion":
        unused |= given & {"field"}
    if unused:
        # Every one of them changes what is trained on.
        raise AutotuneError(
            f"{section.where}: {', '.join(sorted(unused))} "
            f"{'is' if len(unused) == 1 else 'are'} not used here with type {_name(kind)}. "
            f"Known: {', '.join(sorted(_USED))}."
        )
    shards = section.integer("shards", minimum=1)
    shard = section.integer("shards_idx")
    if shard is not None and (shards is None or shard >= shards):
        raise section.error("shards_idx", "It counts from 0 and is less than shards.")
    train_on_eos = section.text("train_on_eos", choices=get_args(TrainOnEnd))
    return DatasetSource(
        path=_path(section, folder),
        type=kind,
        split=section.text("split", "train"),
        data_files=_texts(section, "data_files"),
        shards=shards,
        shards_idx=shard,
        skip=section.integer("skip"),
        chat_template_jinja=_jinja(section.text("chat_template_jinja"), folder),
        message_property_mappings=_mappings(section),
        roles=_roles(section),
        roles_to_train=_texts(section, "roles_to_train"),
        drop_system_message=section.boolean("drop_system_message", False) or None,
        train_on_eos=cast(TrainOnEnd | None, train_on_eos),
        **{
            name: section.text(name)
            for name in (
                "name", "revision", "ds_type", "field", "chat_template", "field_messages",
                "field_tools", "message_field_training",
            )
        },
    )  # fmt: skip


def _path(section: Section, folder: Path) -> str:
    path = section.text("path")
    if path is None:
        raise AutotuneError(f"{section.where} has no path. Give the path of a data file.")
    if not os.path.exists(path) and os.path.exists(folder / path):
        path = str(folder / path)
    return path


def _type(section: Section) -> str | PromptFormat:
    """Read `type`: a name, or a mapping that says how a prompt is written."""
    value = section.raw("type", "completion")
    if not isinstance(value, Mapping):
        return section.text("type", "completion", choices=DATASET_TYPES)
    place = f"{section.where}: type"
    check_known(value, PromptFormat.model_fields, place)
    try:
        given = {key: text for key, text in value.items() if text is not None}
        if "format" in given and "no_input_format" not in given:
            given["no_input_format"] = given["format"].replace("{input}", "")
        return PromptFormat.model_validate(given)
    except (ValidationError, AttributeError) as error:
        raise AutotuneError(f"{place}: every value is text.") from error


def _name(kind: str | PromptFormat) -> str:
    return kind if isinstance(kind, str) else "of its own"


def _mappings(section: Section) -> dict[str, str] | None:
    value = section.raw("message_property_mappings", {})
    if not isinstance(value, Mapping) or not all(
        isinstance(text, str) for pair in value.items() for text in pair
    ):
        raise section.error(
            "message_property_mappings", "Write names, such as {role: from, content: value}."
        )
    mappings = dict(value)
    for old, name in (("message_field_role", "role"), ("message_field_content", "content")):
        column = section.text(old)
        if column is not None and mappings.setdefault(name, column) != column:
            raise section.error(old, f"It contradicts message_property_mappings.{name}.")
    return mappings or None


def _roles(section: Section) -> dict[str, list[str]] | None:
    value = section.raw("roles")
    if value is None:
        return None
    if not isinstance(value, Mapping) or not all(
        isinstance(role, str)
        and isinstance(names, list)
        and all(isinstance(name, str) for name in names)
        for role, names in value.items()
    ):
        raise section.error("roles", "Write lists of names, such as {assistant: [bot, gpt]}.")
    return dict(value)


def _texts(section: Section, key: str) -> list[str] | None:
    value = section.raw(key)
    if value is None:
        return None
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        raise section.error(key, "Write text or a list of texts.")
    return texts


def _jinja(given: str | None, folder: Path) -> str | None:
    """Return the text of a template; `given` may be the path of one."""
    if given is None or "{" in given or "\n" in given:
        return given
    for path in (Path(given), folder / given):
        if os.path.isfile(path):  # unlike Path.is_file, false for a name too long to be one
            return read_text(path)
    raise AutotuneError(
        f"chat_template_jinja: {given!r} is neither a template nor a file. Check the path."
    )


def _refuse_remote_code(section: Section) -> None:
    if section.boolean("trust_remote_code", False):
        raise section.error("trust_remote_code", "Code that comes with data is not run here.")
