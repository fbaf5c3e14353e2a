"""Entry: ``python -m autotune.runner.trace REQUEST.json ANSWER.json``.

The request holds ``config`` and ``keys``; the answer ``profiles``, one a key, or ``error`` where
the model is none that can be trained, or ``failure`` where the trace itself went wrong.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

from autotune.errors import AutotuneError
from autotune.memory.profile_json import key_from_json, profile_to_json


def main() -> int:
    """Trace what the request asks for; return the exit status."""
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    request = json.loads(Path(sys.argv[1]).read_text())
    try:
        answer: dict[str, Any] = {"profiles": _trace(request["config"], request["keys"])}
    except AutotuneError as error:
        answer = {"error": str(error)}
    except Exception as error:  # the process edge
        answer = {"failure": f"{type(error).__name__}: {error}"}
    Path(sys.argv[2]).write_text(json.dumps(answer))
    return 0


def _trace(config: dict[str, Any], keys: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from autotune.runner.trace.profiles import trace_profiles

    return list(map(profile_to_json, trace_profiles(config, list(map(key_from_json, keys)))))


if __name__ == "__main__":
    sys.exit(main())
