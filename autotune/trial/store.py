"""The study's records: append-only JSON lines that survive a kill in mid-write."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from autotune.errors import AutotuneError
from autotune.trial.record import TrialRecord

RECORDS_FILE = "trials.jsonl"


class RecordStore:
    """Finished configurations of one study, by plan id."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / RECORDS_FILE
        self._records: dict[str, TrialRecord] = {}
        self._cut_half_written_line()
        for record in read_records(self._path):
            self._records[record.plan_id] = record

    def __contains__(self, plan_id: str) -> bool:
        return plan_id in self._records

    def get(self, plan_id: str) -> TrialRecord | None:
        """Return the record of a plan, if it has one."""
        return self._records.get(plan_id)

    def all(self) -> list[TrialRecord]:
        """Return every record in the order it was added."""
        return list(self._records.values())

    def add(self, records: Iterable[TrialRecord]) -> list[TrialRecord]:
        """Append the records of plans not yet known; return those that were added."""
        new = [record for record in records if record.plan_id not in self._records]
        with self._path.open("a") as file:
            for record in new:
                file.write(json.dumps(record.to_dict()) + "\n")
                self._records[record.plan_id] = record
            file.flush()
            os.fsync(file.fileno())
        return new

    def _cut_half_written_line(self) -> None:
        """Drop what a killed search left after the last newline, so the next line starts clean."""
        if not self._path.exists():
            return
        data = self._path.read_bytes()
        # Cut in place: writing the file anew could lose all of it to a second kill.
        os.truncate(self._path, data.rfind(b"\n") + 1)


def read_records(path: Path) -> list[TrialRecord]:
    """Read the records of a study; a half-written last line is left out.

    Raises:
        AutotuneError: a whole line is no record.
    """
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [_read(path, number, line) for number, line in enumerate(lines[:-1], 1) if line]


def _read(path: Path, number: int, line: str) -> TrialRecord:
    try:
        return TrialRecord.from_dict(json.loads(line))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise AutotuneError(
            f"{path} line {number} is no record of a trial. Take that line out and its "
            "configuration is measured again, or search in another --out."
        ) from error
