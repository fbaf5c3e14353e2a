"""The child process that runs a model's own code; this process never imports the training stack.

`python -m autotune.runner.trace` reads requests from its standard input, one JSON document a line,
and answers each with a line. Its start (importing torch and transformers) takes most of the time,
so who asks a first question may keep the child for the next.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

START_S = 120
"""Limit of a child's start; it takes some 10 s."""
TRACE_VARIABLE = "AUTOTUNE_TRACE"
"""Environment variable: ``off`` starts no child."""
_STACK = ("torch", "transformers", "accelerate", "peft")
# What a config says of its files, not of its model.
_NOT_THE_MODEL = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures"}

_kept: list[_Child] = []


def can_trace() -> bool:
    """Say whether the training stack is installed and tracing not switched off."""
    off = os.environ.get(TRACE_VARIABLE, "").lower() in ("off", "0")
    return not off and all(map(find_spec, ("torch", "transformers", "accelerate")))


def needs_stack(name: str, architecture: str) -> str:
    """Return what to say where a model can only be known by tracing it."""
    if can_trace():
        return f"What {name} (model_type {architecture!r}) allocates could not be traced."
    return (
        f"Model {name!r} has model_type {architecture!r}, whose parameters and memory are counted "
        "in the model that transformers builds: install the training stack (pip install "
        f"'autotune-llm[train]') and leave {TRACE_VARIABLE} unset."
    )


def ask(request: dict[str, Any], limit_s: float, *, keep: bool = False) -> dict[str, Any]:
    """Ask a child; a kept one if there is one.

    Args:
        request: what `autotune.runner.trace` understands.
        limit_s: for the answer.
        keep: leave the child running for the next question.

    Returns:
        What it answered; ``failure`` with a reason where it did not.
    """
    try:
        child = _kept.pop()
    except IndexError:
        child = _Child()
    answered = child.ask(request, limit_s)
    if keep and "failure" not in answered:
        _kept.append(child)
    else:
        child.close()
    return answered


def end_kept() -> None:
    """End the child that waits for a question, if any."""
    while _kept:
        _kept.pop().close()


atexit.register(end_kept)


class _Child:
    def __init__(self) -> None:
        self._said = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "autotune.runner.trace"],
            env=_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
        )

    def ask(self, request: dict[str, Any], limit_s: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return {"failure": self._last_words()}
        line = self._read_line(limit_s)
        if line is None:
            return {"failure": f"it took over {limit_s:.0f} s and was stopped"}
        if not line.endswith(b"\n"):
            return {"failure": self._last_words()}
        answered: dict[str, Any] = json.loads(line)
        return answered

    def _read_line(self, limit_s: float) -> bytes | None:
        """Return a line, less where the child ended, None after the limit."""
        assert self._process.stdout is not None
        pipe, read, deadline = self._process.stdout.fileno(), b"", time.monotonic() + limit_s
        while not read.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                return None
            part = os.read(pipe, 1 << 16)
            if not part:
                break
            read += part
        return read

    def _last_words(self) -> str:
        code = self._process.wait()
        self._said.seek(0)
        said = self._said.read().decode(errors="replace").strip().splitlines()[-1:]
        return " ".join(said) or f"it ended with {code}"

    def close(self) -> None:
        self._process.kill()  # it holds nothing that could be lost
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._said):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # of a question that it did not take
                    pipe.close()


def _environment() -> dict[str, str]:
    package_parent = str(Path(__file__).resolve().parents[3])
    paths = filter(None, [package_parent, os.environ.get("PYTHONPATH")])
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        # Nothing is computed: no device, no threads, nothing to download.
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def config_digest(config: dict[str, Any]) -> str:
    """Return what tells models apart: of the config without what names its files."""
    told = {k: v for k, v in config.items() if k not in _NOT_THE_MODEL}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]


@cache
def stack_versions() -> tuple[str, ...]:
    """Return the versions of what a trace runs; empty where a package is missing."""
    return tuple(map(_version, _STACK))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
