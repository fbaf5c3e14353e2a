"""Asks a tool about many files at once: its imports take longer than its answers."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def ask(
    python: str | Path, worker: str, questions: list[Any], folder: Path, **environment: str
) -> list[dict[str, Any]]:
    """Run ``worker questions.json answers.json`` in `folder` and return its answers, one each.

    An answer has ``error`` (text, or None where the tool accepted) and what the worker read.
    """
    (folder / "questions.json").write_text(json.dumps(questions))
    done = subprocess.run(
        [python, HERE / worker, "questions.json", "answers.json"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": "", "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads((folder / "answers.json").read_text())
    assert len(answers) == len(questions)
    return answers
