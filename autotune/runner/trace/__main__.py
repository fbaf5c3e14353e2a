"""Entry: ``python -m autotune.runner.trace``, one JSON request a line, one JSON answer a line.

A request holds a ``config``, and ``keys`` to trace; without keys it asks what the model is. The
answer holds ``profiles``, one a key, or ``model``; ``error`` where the model is none that can be
trained. Where the trace itself goes wrong, the process ends: its last words are the reason.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from typing import Any

from autotune.errors import AutotuneError
from autotune.memory.profile_json import key_from_json, profile_to_json


def main() -> int:
    """Answer requests until there are no more; return the exit status."""
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    # What libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for line in sys.stdin:
        answers.write(json.dumps(_answer(json.loads(line))) + "\n")
        answers.flush()
    return 0


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        if "keys" not in request:
            return {"model": _describe(request["config"])}
        return {"profiles": _trace(request["config"], request["keys"])}
    except AutotuneError as error:
        return {"error": str(error)}


def _describe(config: dict[str, Any]) -> dict[str, Any]:
    from autotune.runner.trace.describe import describe

    return describe(config).model_dump(mode="json")


def _trace(config: dict[str, Any], keys: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from autotune.runner.trace.profiles import trace_profiles

    return list(map(profile_to_json, trace_profiles(config, list(map(key_from_json, keys)))))


if __name__ == "__main__":
    sys.exit(main())
