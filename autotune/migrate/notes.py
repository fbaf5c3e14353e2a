"""What a person must know about a migrated file."""

from __future__ import annotations


class Notes:
    """Collects messages; each names the file and the key."""

    def __init__(self, where: str) -> None:
        self._where = where
        self.lines: list[str] = []

    def add(self, text: str) -> None:
        """Add one."""
        self.lines.append(f"{self._where}: {text}")

    def removed(self, key: str, reason: str, *, ignored: bool) -> None:
        """Say that a key is gone and whether it did anything."""
        before = ", and FSDP1 ignored it here, too" if ignored else ""
        self.add(f"{key} removed: {reason}{before}.")
