"""`migrate`: a configuration's text into the same text for FSDP2, and what to know about it."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from autotune.config.keys import key_catalogue
from autotune.config.reading import read_text
from autotune.errors import AutotuneError
from autotune.migrate.accelerate import is_accelerate, migrate_accelerate
from autotune.migrate.axolotl import migrate_axolotl
from autotune.migrate.document import Document
from autotune.migrate.mesh import Mesh
from autotune.migrate.notes import Notes


@dataclass(frozen=True, kw_only=True, slots=True)
class Migration:
    """What became of one file; nothing is written."""

    path: Path
    kind: str
    """``axolotl`` or ``accelerate``."""
    before: str
    after: str
    warnings: tuple[str, ...]
    """Each removed or changed key with its reason, and what was ignored before."""

    @property
    def changed(self) -> bool:
        """Say whether there was anything to migrate."""
        return self.after != self.before

    @property
    def diff(self) -> str:
        """Return the change as a unified diff; empty where there is none."""
        lines = difflib.unified_diff(
            self.before.splitlines(keepends=True),
            self.after.splitlines(keepends=True),
            fromfile=str(self.path),
            tofile=f"{self.path} (FSDP2)",
        )
        ended = (line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n"
                 for line in lines)  # fmt: skip
        return "".join(ended)


def migrate(path: Path, *, mesh: Mesh | None = None, as_written: bool = False) -> Migration:
    """Return the file for FSDP2: comments, order and every other key stay as they are.

    A file without FSDP, or for FSDP2 already, comes back as it is.

    Args:
        path: An Axolotl or an accelerate configuration.
        mesh: The GPUs and nodes of a hybrid strategy, where the file does not say.
        as_written: Take settings at their word that FSDP1 ignored; without it, the file goes on
            doing what it did.

    Raises:
        AutotuneError: no such file, no YAML, no configuration of either kind, or FSDP1 settings
            that FSDP2 has no counterpart of.
    """
    read_text(path)  # its errors
    # As it stands in the file: line ends are part of what must not change.
    with path.open(encoding="utf-8", newline="") as file:
        before = file.read()
    document = Document(before, path)
    notes = Notes(str(path))
    accelerate = is_accelerate(document.values)
    if accelerate:
        migrate_accelerate(document, notes, mesh=mesh, as_written=as_written)
    else:
        _check_axolotl(document, path)
        migrate_axolotl(document, notes, mesh=mesh, as_written=as_written)
    return Migration(
        path=path,
        kind="accelerate" if accelerate else "axolotl",
        before=before,
        after=document.text(),
        warnings=tuple(notes.lines),
    )


def _check_axolotl(document: Document, path: Path) -> None:
    if not document.values.keys() & key_catalogue().top_level:
        raise AutotuneError(
            f"{path}: none of its keys is one of Axolotl's (base_model, fsdp_config ...), and it "
            "has no distributed_type as accelerate's files have. Give a configuration of one of "
            "the two."
        )
