"""`Finding`, what a check says, and `Machine`, where it looks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path


class Level(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    NOTE = "note"
    """Worth knowing; nothing is wrong."""
    WARNING = "warning"
    """Slower than it need be, or breaks later."""
    BROKEN = "broken"
    """A run stops or hangs on it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing a check has seen."""

    check: str
    """Its name, the same in every run: for scripts that read the JSON."""
    level: Level
    seen: str
    do: str = ""
    """What to do; empty where nothing is to be done."""

    def to_dict(self) -> dict[str, str]:
        """Return the JSON form."""
        return {
            "check": self.check, "level": str(self.level), "seen": self.seen, "do": self.do,
        }  # fmt: skip


def ok(check: str, seen: str) -> Finding:
    """Return that all is well."""
    return Finding(check=check, level=Level.OK, seen=seen)


def note(check: str, seen: str, do: str = "") -> Finding:
    """Return what is worth knowing."""
    return Finding(check=check, level=Level.NOTE, seen=seen, do=do)


def warning(check: str, seen: str, do: str) -> Finding:
    """Return what slows a run or breaks it later."""
    return Finding(check=check, level=Level.WARNING, seen=seen, do=do)


def broken(check: str, seen: str, do: str) -> Finding:
    """Return what a run stops on."""
    return Finding(check=check, level=Level.BROKEN, seen=seen, do=do)


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Where the checks look: this machine, or a folder that holds the files of another."""

    root: Path = Path("/")
    """Parent of `proc`, `sys` and `dev`."""
    home: Path = field(default_factory=Path.home)
    variables: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    """The environment a run would inherit."""

    def read(self, path: str) -> str | None:
        """Return the text of a file under the root; None where there is none to read."""
        try:
            return (self.root / path).read_text(errors="replace").strip()
        except OSError:
            return None

    def names(self, folder: str) -> list[str]:
        """Return the names in a folder under the root, in order; empty where there is none."""
        try:
            return sorted(path.name for path in (self.root / folder).iterdir())
        except OSError:
            return []
