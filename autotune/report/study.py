"""Read a study folder: what `autotune search` was asked, what it measured, how it ended."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter

from autotune.errors import AutotuneError
from autotune.trial.record import TrialRecord

SCHEMA_VERSION = 1
NOT_ENDED = ("", None, "still running", "interrupted")
"""What `stopped_because` holds before a stop rule of the search did."""
_STRICT = ConfigDict(strict=True, allow_inf_nan=False)
_SUMMARY_KINDS: dict[str, Any] = {
    "study": str | None,
    "best": dict[str, Any] | None,
    "stopped_because": str | None,
    "rejected": list[dict[str, Any]] | None,
    "launches": int | None,
    "elapsed_s": Annotated[float, Field(ge=0)] | None,
}
"""What the reports read of `summary.json`; the rest of it they take from the records."""


@dataclass(frozen=True, slots=True)
class StudyFolder:
    """Where the files of a study are."""

    path: Path

    @property
    def contract_file(self) -> Path:
        """What was asked: command, model, workload, hardware, versions."""
        return self.path / "study.json"

    @property
    def trials_file(self) -> Path:
        """One `TrialRecord` a line, appended as the trials end."""
        return self.path / "trials.jsonl"

    @property
    def summary_file(self) -> Path:
        """The best so far and why the search stopped; rewritten after each launch."""
        return self.path / "summary.json"

    @property
    def best_file(self) -> Path:
        """The winning configuration, ready for `autotune train`."""
        return self.path / "best.yml"

    @property
    def csv_file(self) -> Path:
        """One row a trial."""
        return self.path / "trials.csv"

    @property
    def html_file(self) -> Path:
        """The self-contained page."""
        return self.path / "report.html"


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """A study as its files tell it. Only `contract` and `records` are always there."""

    folder: StudyFolder
    contract: dict[str, Any]
    """`study.json`."""
    records: tuple[TrialRecord, ...]
    """In the order they were written; a plan measured in two launches has two."""
    summary: dict[str, Any]
    """`summary.json`, or an empty dict before the first launch has ended."""
    best_yml: str | None
    notes: tuple[str, ...] = ()
    """What could not be read and was left out, one sentence each."""

    @property
    def name(self) -> str:
        """The study's own name, or its folder's."""
        return str(self.summary.get("study") or self.folder.path.resolve().name)

    @property
    def model_name(self) -> str:
        """What the user called the model."""
        return str(self.section("model").get("name", "unnamed model"))

    @property
    def has_ended(self) -> bool:
        """False while the search runs, and when it was stopped from outside."""
        return self.summary.get("stopped_because", "") not in NOT_ENDED

    @property
    def summary_is_current(self) -> bool:
        """Tell whether the summary was written after the last record; a kill comes in between."""
        launches = self.summary.get("launches")
        last = max((record.launch for record in self.records), default=0)
        return isinstance(launches, int) and launches >= last

    @property
    def memory_limit_bytes(self) -> int | None:
        """What one rank may take: the stated limit, or the device's memory."""
        limit = self.contract.get("memory_limit_bytes") or self.section("hardware").get(
            "memory_bytes"
        )
        return int(limit) if limit else None

    @property
    def rejected(self) -> list[dict[str, Any]]:
        """Plans the rules or the memory estimate refused before any launch."""
        return [dict(entry) for entry in self.summary.get("rejected") or []]

    def section(self, name: str) -> dict[str, Any]:
        """Return an object of `study.json`, empty when an older version did not write it."""
        found = self.contract.get(name)
        return dict(found) if isinstance(found, dict) else {}


def load_study(path: Path) -> Study:
    """Read a study folder.

    A search that was killed leaves half a line at the end of `trials.jsonl`, or in its middle once
    the same command has resumed it. Such lines are left out and named in `Study.notes`.

    Raises:
        AutotuneError: not a study folder, or `study.json` cannot be read.
    """
    folder = StudyFolder(path)
    contract = _read_contract(folder)
    records, notes = _read_records(folder.trials_file)
    summary, summary_notes = _read_summary(folder.summary_file)
    best_yml = None
    if folder.best_file.is_file():
        best_yml = folder.best_file.read_text(encoding="utf-8", errors="replace")
    return Study(
        folder=folder,
        contract=contract,
        records=tuple(records),
        summary=summary,
        best_yml=best_yml,
        notes=(*notes, *summary_notes),
    )


def _read_contract(folder: StudyFolder) -> dict[str, Any]:
    advice = "Give the folder that `autotune search --out` wrote."
    if not folder.path.exists():
        raise AutotuneError(f"{folder.path}: no such folder. {advice}")
    if not folder.path.is_dir():
        raise AutotuneError(f"{folder.path} is a file, not a study folder. {advice}")
    if not folder.contract_file.is_file():
        raise AutotuneError(
            f"{folder.path} is not a study folder: it has no study.json, it holds "
            f"{_listing(folder.path)}. {advice}"
        )
    try:
        contract = json.loads(folder.contract_file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise AutotuneError(
            f"{folder.contract_file} cannot be read: {error}. Without it the trials have no "
            "meaning; restore it or search again in another --out."
        ) from error
    if not isinstance(contract, dict):
        raise AutotuneError(
            f"{folder.contract_file} holds a JSON {type(contract).__name__}, a study's is an "
            f"object. {advice}"
        )
    version = contract.get("schema_version", SCHEMA_VERSION)
    if version != SCHEMA_VERSION:
        raise AutotuneError(
            f"{folder.contract_file} has schema_version {version!r}, this autotune reads "
            f"{SCHEMA_VERSION}. Use the version of autotune that wrote it."
        )
    _check_contract(folder, contract)
    return contract


def _check_contract(folder: StudyFolder, contract: dict[str, Any]) -> None:
    """Refuse sizes that are none; every other value is shown as it is written."""
    for path in ("memory_limit_bytes", "hardware.memory_bytes", "model.num_parameters"):
        section, _, name = path.rpartition(".")
        found = contract.get(section) if section else contract
        size = found.get(name) if isinstance(found, dict) else None
        if size is not None and (type(size) is not int or not 0 < size < 2**63):
            raise AutotuneError(
                f"{folder.contract_file}: {path} is {str(size)[:40]!r}, which is no such number. "
                "Restore it or search again in another --out."
            )


def _listing(path: Path, most: int = 8) -> str:
    names = sorted(entry.name + "/" * entry.is_dir() for entry in path.iterdir())
    if not names:
        return "nothing"
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _read_records(path: Path) -> tuple[list[TrialRecord], list[str]]:
    if not path.is_file():
        return [], []
    records: list[TrialRecord] = []
    notes: list[str] = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            # NaN and Infinity are no figures: read as not measured.
            values = json.loads(line, parse_constant=lambda _: None)
            records.append(TrialRecord.from_dict(values))
        except (ValueError, TypeError, KeyError, AttributeError):
            # Broken JSON or UTF-8, a JSON value that is no object, a missing field, a value that
            # no trial can have written.
            notes.append(
                f"{path.name} line {number} is not a whole record ({len(line)} bytes) and is "
                "left out; a search that was killed leaves such a line, or an edit by hand."
            )
    return records, notes


def _read_summary(path: Path) -> tuple[dict[str, Any], list[str]]:
    if not path.is_file():
        return {}, []
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return {}, [f"{path.name} cannot be read ({error}); the answer is from the records alone."]
    if not isinstance(summary, dict):
        return {}, [f"{path.name} is not an object; the answer is from the records alone."]
    notes = []
    for name, kind in _SUMMARY_KINDS.items():
        try:
            TypeAdapter(kind, config=_STRICT).validate_python(summary.get(name))
        except ValueError:
            del summary[name]
            notes.append(f"{name} in {path.name} is not what a search writes and is left out.")
    return summary, notes
