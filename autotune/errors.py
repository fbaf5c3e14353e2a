"""Errors a user can cause, and the exit code each of them ends with."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AutotuneError(Exception):
    """A user's mistake or an unmet need: what was given, what is allowed, what to do.

    The command line prints the message alone (no traceback) and exits with `exit_code`.
    """

    exit_code = 2


class NothingFitsError(AutotuneError):
    """No configuration fits or the run failed: not bad input, but no result either."""

    exit_code = 1


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """Return ``" Nearest: a, b."`` for a misspelt name, or an empty string when nothing is near."""
    close = difflib.get_close_matches(name.lower(), list(known), n=count, cutoff=0.5)
    return f" Nearest: {', '.join(close)}." if close else ""
