"""`Translated`: another tool's configuration in Axolotl's keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from autotune.errors import AutotuneError


@dataclass(kw_only=True)
class Translated:
    """What a file says, as the keys `autotune.config.run.read_config` reads."""

    keys: dict[str, Any] = field(default_factory=dict)
    num_gpus: int | None = None
    """Ranks the file itself names."""
    device: str | None = None
    warnings: list[str] = field(default_factory=list)

    def warn_unused(self, where: str, keys: list[str], reason: str) -> None:
        """Name keys that are left out, and why."""
        if keys:
            self.warnings.append(f"{where}: not used here ({reason}): {', '.join(sorted(keys))}.")

    def set_ranks(self, where: str, stated: int | None, asked: int | None) -> None:
        """Settle the number of ranks: what was asked for wins over what the file states.

        Raises:
            AutotuneError: the file states fewer than one.
        """
        if stated is not None and stated < 1:
            raise AutotuneError(f"{where}: {stated} processes: at least 1 is needed.")
        if stated is not None and asked is not None and stated != asked:
            self.warnings.append(
                f"{where}: the file is for {stated} ranks; it is read for {asked}, as asked."
            )
        self.num_gpus = asked if asked is not None else stated
