"""Typed reading of a mapping a person wrote, with messages that say what is allowed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, overload

from autotune.errors import AutotuneError, nearest

_LARGEST = 2**53


def shorten(text: str, length: int) -> str:
    """Return text of at most `length` characters: a message must stay readable."""
    return text if len(text) <= length else f"{text[: length - 4]} ..."


class Section:
    """A mapping from a configuration file that remembers which keys were read.

    A null value counts as an absent key, as it does in Axolotl. Numbers may be text: YAML 1.1
    reads ``2e-5`` as a string.

    Raises:
        AutotuneError: a key that is not text.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        for key in values:
            if not isinstance(key, str):
                raise AutotuneError(f"{where}: the key {key!r} is not text. Put it in quotes.")
        self._values = values
        self.where = where
        self._read: set[str] = set()

    def raw(self, key: str, default: Any = None) -> Any:
        """Return the value as it stands."""
        self._read.add(key)
        value = self._values.get(key)
        return default if value is None else value

    def has(self, key: str) -> bool:
        """Tell whether the key carries a value, without counting it as read."""
        return self._values.get(key) is not None

    def unread(self) -> dict[str, Any]:
        """Return what nobody asked for, null values included."""
        return {key: value for key, value in self._values.items() if key not in self._read}

    def error(self, key: str, allowed: str) -> AutotuneError:
        """Build the error for a value that is not allowed."""
        given = shorten(repr(self._values.get(key)), 200)
        return AutotuneError(f"{self.where}: {key}: {given} is not allowed here. {allowed}")

    @overload
    def integer(self, key: str, default: int, *, minimum: int = 0) -> int: ...
    @overload
    def integer(self, key: str, default: None = None, *, minimum: int = 0) -> int | None: ...
    def integer(self, key: str, default: int | None = None, *, minimum: int = 0) -> int | None:
        """Read a whole number from `minimum` up to 2**53, where floats stop being exact."""
        allowed = f"Write a whole number of at least {minimum}."
        number = self._number(key, allowed)
        if number is None:
            return default
        if number > _LARGEST:
            raise self.error(key, f"Write a whole number from {minimum} up to {_LARGEST}.")
        if number != int(number) or number < minimum:
            raise self.error(key, allowed)
        return int(number)

    @overload
    def number(self, key: str, default: float, *, minimum: float = 0.0) -> float: ...
    @overload
    def number(self, key: str, default: None = None, *, minimum: float = 0.0) -> float | None: ...
    def number(
        self, key: str, default: float | None = None, *, minimum: float = 0.0
    ) -> float | None:
        """Read a finite number of at least `minimum`."""
        allowed = f"Write a number of at least {minimum:g}, such as 2e-5."
        number = self._number(key, allowed)
        if number is None:
            return default
        if number < minimum:
            raise self.error(key, allowed)
        return number

    def boolean(self, key: str, default: bool) -> bool:
        """Read true or false."""
        value = self.raw(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, "Write true or false.")
        return value

    @overload
    def text(self, key: str, default: str, *, choices: Collection[str] = ()) -> str: ...
    @overload
    def text(
        self, key: str, default: None = None, *, choices: Collection[str] = ()
    ) -> str | None: ...
    def text(
        self, key: str, default: str | None = None, *, choices: Collection[str] = ()
    ) -> str | None:
        """Read text, one of `choices` when there are any."""
        value = self.raw(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.error(key, "Write text.")
        if choices and value not in choices:
            allowed = f"Allowed: {', '.join(choices)}.{nearest(value, choices)}"
            raise self.error(key, allowed)
        return value

    def section(self, key: str) -> Section | None:
        """Read a nested mapping."""
        value = self.raw(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.error(key, "Write a mapping of keys to values.")
        return Section(value, f"{self.where}: {key}")

    def _number(self, key: str, allowed: str) -> float | None:
        value = self.raw(key)
        if value is None:
            return None
        try:
            # bool is an int to Python, but `true` is no number to a person.
            number = float("nan") if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            raise self.error(key, allowed) from None
        if number != number or number in (float("inf"), float("-inf")):
            raise self.error(key, allowed)
        return number
