"""``python -m tests.conformance.tools.environments``: one environment a tool, in the cache folder.

Each holds the tool's wheel without its dependencies and the few packages its configuration code
imports; the rest (torch, transformers, pydantic ...) comes from the environment this runs in, on a
path file. So nothing of the tools enters that environment, and no gigabytes are fetched twice.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

VARIABLE = "AUTOTUNE_CONFORMANCE"
"""Set by `make conformance`: the tools' tests run, and skip with a reason where one is missing."""
HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A tool and what its configuration code needs beside the training stack."""

    wheel: str
    needs: tuple[str, ...]
    """Installed without dependencies, too."""


TOOLS = {
    "axolotl": Tool(wheel="axolotl==0.19.0", needs=("addict",)),
    "torchtitan": Tool(
        wheel="torchtitan==0.3.0",
        needs=("tyro", "typeguard", "docstring-parser", "torchdata", "spmd_types==0.2.3",
               "torch_checkpointing", "triton", "torchao"),
    ),
    "llamafactory": Tool(
        wheel="llamafactory==0.9.5", needs=("omegaconf", "antlr4-python3-runtime==4.9.3")
    ),
}  # fmt: skip


def folder_of(name: str) -> Path:
    """Return where a tool's environment lies."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return cache / "autotune" / "conformance" / f"{TOOLS[name].wheel}-py{version}"


def install(name: str) -> str:
    """Make a tool's environment where it is not there yet; return what was done."""
    tool, folder = TOOLS[name], folder_of(name)
    done = folder / "installed"
    parent = sysconfig.get_path("purelib")
    made_of = "\n".join([parent, tool.wheel, *tool.needs])
    if done.exists() and done.read_text() == made_of:
        return f"{name}: {folder} is there"
    venv.create(folder, clear=True, with_pip=True)
    paths = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", "posix_prefix", paths))
    (site / "training_stack.pth").write_text(parent + "\n")
    command = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps"]
    failed = subprocess.run([*command, tool.wheel, *tool.needs], check=False).returncode
    if failed:
        return f"{name}: could not be installed (pip ended with {failed}); its tests are skipped"
    done.write_text(made_of)
    return f"{name}: installed in {folder}"


def python_of(name: str) -> Path:
    """Return a tool's interpreter, or skip the test with the reason."""
    if not os.environ.get(VARIABLE):
        pytest.skip("`make conformance` runs it")
    if not (folder_of(name) / "installed").exists():
        pytest.skip(f"{name} is not installed in {folder_of(name)}")
    return folder_of(name) / "bin" / "python"


def main() -> None:
    for name in TOOLS:
        print(install(name), flush=True)


if __name__ == "__main__":
    main()
