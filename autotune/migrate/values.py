"""What a value of `fsdp_config` may be, whichever tool reads it."""

from __future__ import annotations

from autotune.config.values import Section


def check_values(fsdp: Section) -> None:
    """Refuse lists and mappings where both tools want one value, so that none is carried over.

    Raises:
        AutotuneError: names the key.
    """
    for key, value in fsdp.unread().items():
        if isinstance(value, list | dict) and key.removeprefix("fsdp_") != "ignored_modules":
            raise fsdp.error(key, "Write one value; several layer classes as A,B.")
