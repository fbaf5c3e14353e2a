"""A part of a sweep that cannot be measured is noted, however it ends, and costs no other part."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from autotune.calibrate.spec import SweepAnswer, answer_file

SCRIPT = """
import os, signal, sys
from autotune.calibrate.spec import SweepSpec
from autotune.runner.sweep import _in_fork

def refused(spec, answer):
    raise RuntimeError("gloo: connection closed")

def broken(spec, answer):
    answer.matmuls[0]

def killed(spec, answer):
    os.kill(os.getpid(), signal.SIGSEGV)

def measured(spec, answer):
    answer.copy_bytes_per_s = 1e9

spec = SweepSpec(device="cpu", num_ranks=1, precisions=("fp32",), folder=sys.argv[1])
for part in (refused, broken, killed, measured):
    _in_fork(spec, part.__name__, part)
"""


def test_every_part_leaves_an_answer(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        env=os.environ | {"RANK": "0"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "IndexError" in done.stderr, "a bug of ours leaves its trace"
    answers = {
        name: SweepAnswer.model_validate_json((tmp_path / answer_file(0, name)).read_bytes())
        for name in ("refused", "broken", "killed", "measured")
    }
    assert answers["refused"].notes == ["refused: RuntimeError: gloo: connection closed"]
    assert answers["broken"].notes == ["broken: its process ended with 1"]
    assert answers["killed"].notes == ["killed: its process ended with -11"]
    assert answers["measured"].notes == [] and answers["measured"].copy_bytes_per_s == 1e9
