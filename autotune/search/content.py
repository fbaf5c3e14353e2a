"""Digests of local files, so that a study notices when what it reads has changed."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterable
from pathlib import Path

_TOKENIZER_PATTERNS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model",
    "chat_template*",
)  # fmt: skip
"""What transformers reads a tokenizer from (`PreTrainedTokenizerBase.save_pretrained`)."""


def data_digest(path: str) -> str | None:
    """Return a digest of a data file, a folder or what a pattern matches; None for a Hub id.

    Hidden files of a folder do not count: a version control's or a file manager's change often.
    """
    local = Path(path).expanduser()
    if local.is_file():
        return _file_digest(local)
    if local.is_dir():
        found = (file for file in local.rglob("*") if not _is_hidden(file.relative_to(local)))
        return _digest(found, local)
    matched = [Path(name) for name in glob.glob(str(local), recursive=True)]
    return _digest(matched, None) if matched else None


def tokenizer_digest(tokenizer: str | None) -> str | None:
    """Return a digest of a local tokenizer's files; None for a Hub id or none."""
    if tokenizer is None or not Path(tokenizer).is_dir():
        return None
    folder = Path(tokenizer)
    return _digest({file for name in _TOKENIZER_PATTERNS for file in folder.glob(name)}, folder)


def _digest(files: Iterable[Path], folder: Path | None) -> str:
    """Digest names (from the folder, if there is one) and contents, in the order of the names."""
    whole = hashlib.sha256()
    for file in sorted(file for file in files if file.is_file()):
        name = file.relative_to(folder) if folder else file
        whole.update(f"{name}\0{_file_digest(file)}\n".encode())
    return whole.hexdigest()


def _file_digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
