"""Other tools that read our files, each in an environment of its own.

Axolotl pins versions that this project does not use, so its schema runs in another interpreter:

    python -m venv axolotl && echo THIS_ENVIRONMENT/lib/python3.X/site-packages \\
        > axolotl/lib/python3.X/site-packages/stack.pth
    axolotl/bin/pip install --no-deps axolotl==0.19.0 addict art
    AUTOTUNE_AXOLOTL_PYTHON=axolotl/bin/python python -m pytest tests/conformance -rs
"""

from __future__ import annotations

import json
import os
import subprocess
from functools import cache
from pathlib import Path

import pytest

AXOLOTL = "AUTOTUNE_AXOLOTL_PYTHON"
"""Names the interpreter that has Axolotl."""
_VALIDATE = """
import json, os, sys, types
os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"  # it reports what it is used for otherwise
sys.modules["ring_flash_attn"] = types.ModuleType("ring_flash_attn")  # CUDA alone; looked for only
import yaml
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault
answers = {}
for path in json.load(sys.stdin):
    try:
        with open(path, encoding="utf-8") as file:
            config = DictDefault(yaml.safe_load(file))
        validate_config(
            config,
            capabilities={"bf16": True, "fp8": False, "tf32": True, "n_gpu": 8, "n_node": 1,
                          "compute_capability": "sm_90"},
            env_capabilities={"torch_version": "2.12.0"},
        )
        answers[path] = ""
    except Exception as error:
        answers[path] = str(error) or repr(error)
print("ANSWERS" + json.dumps(answers))
"""


@cache
def _axolotl_python() -> str:
    python = os.environ.get(AXOLOTL)
    if not python:
        pytest.skip(f"{AXOLOTL} names no interpreter with Axolotl (tests/conformance/tools.py)")
    found = subprocess.run(
        [python, "-c", "import axolotl.utils.schemas.config"],
        capture_output=True,
        text=True,
        env=os.environ | {"AXOLOTL_DO_NOT_TRACK": "1"},
    )
    if found.returncode:
        pytest.skip(f"{AXOLOTL}={python}: {found.stderr.strip().splitlines()[-1]}")
    return python


def axolotl_says(paths: list[Path]) -> dict[Path, str]:
    """Return Axolotl's own objection to each file, empty where it takes it; skips without it."""
    done = subprocess.run(
        [_axolotl_python(), "-c", _VALIDATE],
        input=json.dumps([str(path) for path in paths]),
        capture_output=True,
        text=True,
        timeout=600,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS")]
    assert lines, done.stderr[-2000:]
    answers = json.loads(lines[-1].removeprefix("ANSWERS"))
    return {Path(path): said for path, said in answers.items()}
