"""The knowledge base: what runs on this machine measured, for the predictions of later studies.

One file of JSON lines in the user's data folder, a line a measured configuration. A line counts on
machines of the same hardware and software, and for the estimator that made its prediction. Nothing
in it is needed: without it, predictions rest on the committed records.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from autotune.errors import AutotuneError
from autotune.memory.fingerprint import Fingerprint, machine_fingerprint
from autotune.memory.residuals import Residuals, Row, Ruler, ruler_of
from autotune.spec.hardware import HardwareSpec
from autotune.spec.model import ModelSpec

VARIABLE = "AUTOTUNE_KNOWLEDGE"
"""Environment variable: a folder in the place of the usual one, or ``off``."""
FILE_NAME = "memory.jsonl"
MOST_ENTRIES = 2000
"""The oldest go first; a line has about 600 bytes."""
MOST_ROWS = 300
"""Runs of one machine that a prediction reads, the newest: the fit grows with their cube."""

LAYOUT = 1
"""Of a line; raised when one no longer reads as the last version's. Newer lines are left as they
are: another installation of this user reads them."""

_LONGEST_LINE = 4096

_LOG = logging.getLogger(__name__)
_Bytes = Annotated[int, Field(gt=0, lt=2**63)]
_Seconds = Annotated[float, Field(gt=0)]


class Entry(BaseModel):
    """One line: a configuration that ran to its end or out of memory."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)

    fingerprint: dict[str, str | int]
    ruler: Annotated[Ruler, Field(strict=False)]
    model: str
    """Of `model_key`."""
    plan_id: str
    workload: str
    """Digest of the workload: with it, model and plan tell runs apart."""
    engine: str
    recompute: str
    predicted_bytes: _Bytes
    """Without any correction, of what the ruler measures."""
    real_bytes: _Bytes
    """Measured; where `exceeded`, what there was and did not suffice."""
    exceeded: bool = False
    recorded_at: str = ""
    """ISO 8601, UTC."""
    plan: dict[str, Any] | None = None
    """`Plan.to_dict`; lines of older versions lack it and the three below."""
    predicted_step_s: _Seconds | None = None
    """Without any correction."""
    measured_step_s: _Seconds | None = None
    timer: str = ""
    """Of `calibrate.knowledge.timer_of`: what predicted the time."""
    layout: Annotated[int, Field(ge=1, le=LAYOUT)] = LAYOUT

    def row(self) -> Row:
        """Return what the residuals take."""
        return Row.measured(
            self.engine,
            self.recompute,
            self.model,
            self.predicted_bytes,
            self.real_bytes,
            exceeded=self.exceeded,
        )

    @property
    def trial(self) -> Trial:
        """Equal for the same trial alone."""
        return self.plan_id, self.recorded_at

    @property
    def run(self) -> tuple[str, ...]:
        """Equal for the same configuration measured again under the same conditions."""
        marks = json.dumps(self.fingerprint, sort_keys=True)
        return marks, self.ruler, self.model, self.workload, self.plan_id


class KnowledgeBase:
    """The file, shared by every search of a user."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE_NAME

    @classmethod
    def of_user(cls) -> KnowledgeBase | None:
        """Return the user's own; None when `VARIABLE` switched it off."""
        own = os.environ.get(VARIABLE, "")
        if own.lower() in ("off", "0"):
            return None
        if own:
            return cls(Path(own).expanduser())
        base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
        return cls(Path(base) / "autotune")

    def entries(self) -> list[Entry]:
        """Return what is known, oldest first, each run once; a damaged file is set aside."""
        try:
            if not self.path.exists():
                return []
            found = _parse(self.path.read_bytes())
            if found.damaged:
                with self._locked():
                    found = self._repaired()
        except OSError as error:
            _LOG.warning("The knowledge base %s cannot be read (%s).", self.path, error.strerror)
            return []
        return _latest(found.good)

    def add(self, new: Sequence[Entry]) -> None:
        """Append entries; other searches may do the same at the same time."""
        if not new:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._locked():
                kept = self._repaired()
                if len(kept.good) + len(kept.newer) + len(new) > MOST_ENTRIES:
                    own = _latest([*kept.good, *new])[-MOST_ENTRIES:]
                    self._replace(own, kept.newer[: MOST_ENTRIES - len(own)])
                else:
                    self._append(new)
        except OSError as error:
            _LOG.warning(
                "What was measured could not be kept in %s (%s); the study itself has it.",
                self.path,
                error.strerror,
            )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self.path.with_suffix(".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _repaired(self) -> _Lines:
        """Return the lines of a file that is whole afterwards. Needs the lock."""
        data = self.path.read_bytes() if self.path.exists() else b""
        found = _parse(data)
        if found.damaged:
            aside = self._free_name()
            self.path.rename(aside)
            self._replace(found.good, found.newer)
            _LOG.warning(
                "The knowledge base %s has %d damaged line(s). It was set aside as %s; the %d "
                "readable line(s) were kept.",
                self.path, found.damaged, aside, len(found.good) + len(found.newer),
            )  # fmt: skip
        elif not data.endswith(b"\n") and data:
            # A killed process left half a line, or an editor took the last newline.
            self._replace(found.good, found.newer)
        return found

    def _append(self, entries: Iterable[Entry]) -> None:
        with self.path.open("ab") as file:
            file.write(_lines(entries))
            file.flush()
            os.fsync(file.fileno())

    def _replace(self, entries: Iterable[Entry], newer: Iterable[bytes]) -> None:
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            file.writelines(line + b"\n" for line in newer)
            file.write(_lines(entries))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)

    def _free_name(self) -> Path:
        number = 1
        while (aside := self.path.with_name(f"{FILE_NAME}.damaged-{number}")).exists():
            number += 1
        return aside


def residuals_for(hardware: HardwareSpec) -> Residuals:
    """Return the residuals for predictions on hardware.

    With the runs of this machine where that is the hardware asked about.
    """
    ruler = ruler_of(on_cpu=hardware.gpu.is_cpu)
    base = KnowledgeBase.of_user()
    if base is None or not base.path.exists():
        return Residuals.known(ruler)
    try:
        machine = machine_fingerprint("cpu" if hardware.gpu.is_cpu else "cuda")
    except AutotuneError:  # no GPU here: a prediction for another machine
        return Residuals.known(ruler)
    if machine.gpu != hardware.gpu.name:
        return Residuals.known(ruler)
    return Residuals.known(ruler, known_rows(base, machine, ruler))


Trial = tuple[str, str]
"""Plan id and time of recording of a trial."""


def known_rows(
    base: KnowledgeBase, machine: Fingerprint, ruler: Ruler, without: Collection[Trial] = ()
) -> list[Row]:
    """Return the runs that count for a machine.

    Args:
        base: The knowledge base.
        machine: What it is asked for.
        ruler: How memory is measured there.
        without: Trials that the asker counts itself: those of a study that is resumed.
    """
    marks = machine.to_dict()
    own = [
        entry
        for entry in base.entries()
        if entry.ruler is ruler and entry.fingerprint == marks and entry.trial not in without
    ]
    return [entry.row() for entry in own[-MOST_ROWS:]]


def model_key(model: ModelSpec) -> str:
    """Return a text that is equal for models of one shape, whatever they are called."""
    canonical = json.dumps(model.hf_config, sort_keys=True, default=str)
    return f"{model.architecture}-{hashlib.sha256(canonical.encode()).hexdigest()[:12]}"


class _Lines(NamedTuple):
    """What a file holds, each in its order."""

    good: list[Entry]
    newer: list[bytes]
    """Of a layout this version does not know."""
    damaged: int


def _parse(data: bytes) -> _Lines:
    """Read a file.

    The half line that a killed process leaves at the end of a file of entries is no damage.
    """
    good: list[Entry] = []
    newer: list[bytes] = []
    damaged = 0
    *lines, last = data.split(b"\n")
    for line in (*lines, last):
        try:
            good.append(Entry.model_validate_json(line))
        except ValidationError:
            if _is_newer(line):
                newer.append(line)
                continue
            half = line is last and line.startswith(b"{") and len(line) < _LONGEST_LINE
            damaged += bool(line.strip()) and not half
    return _Lines(good, newer, damaged)


def _is_newer(line: bytes) -> bool:
    try:
        found = json.loads(line)
    except ValueError:  # UnicodeDecodeError is one
        return False
    layout = found.get("layout") if isinstance(found, dict) else None
    return isinstance(layout, int) and layout > LAYOUT


def _latest(entries: Iterable[Entry]) -> list[Entry]:
    found: dict[tuple[str, ...], Entry] = {}
    for entry in entries:
        found.pop(entry.run, None)
        found[entry.run] = entry
    return list(found.values())


def _lines(entries: Iterable[Entry]) -> bytes:
    return b"".join(entry.model_dump_json().encode() + b"\n" for entry in entries)
