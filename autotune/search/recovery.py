"""Brings in what a search left that was killed or stopped in mid-launch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from autotune.search.book import Book
from autotune.search.job import plan_of
from autotune.search.live import STUDY_VARIABLE, records_of
from autotune.trial.folder import LAUNCHES, asked_rungs, numbered_launches, read_results
from autotune.trial.launch import Ended
from autotune.trial.processes import kill_tagged
from autotune.trial.protocol import (
    REQUEST_FILE,
    Outcome,
    Request,
    read_message,
)


def kill_left_ranks(study: Path) -> None:
    """End the ranks that a dead search left."""
    kill_tagged(STUDY_VARIABLE, str(study.resolve()))


def keep_finished(study: Path, book: Book, note: Callable[[str], object]) -> None:
    """Record the rungs that launches finished before they were cut short."""
    for number, folder in numbered_launches(study / LAUNCHES):
        if not (folder / REQUEST_FILE).exists():
            continue
        request = read_message(Request, folder / REQUEST_FILE)
        if request.converses:
            request = request.model_copy(update={"rungs": asked_rungs(folder)})
        family = book.family_by_id(request.plan_object().family_id)
        known = [r for r in request.rungs if book.store.get(plan_of(request, r).id) is not None]
        if family is None or len(known) == len(request.rungs):
            continue
        cut = Ended(
            outcome=Outcome.INTERRUPTED,
            message="the search was stopped",
            rank=None,
            exit_codes=[],
            elapsed_s=0.0,
            results=read_results(folder),
        )
        # The folder may have been moved together with the study.
        request = request.model_copy(update={"out_dir": str(folder)})
        found = book.add(family, records_of(study, book, family, request, cut, number))
        if found:
            note(f"kept {len(found)} finished rungs of launch {number}")
