"""Checks of what is installed: versions, known clashes, a compiler, accelerate's leftovers."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import distributions

from autotune.doctor.finding import Finding, Machine, broken, note, ok, warning

LOWEST = {
    "torch": (2, 11), "transformers": (5, 17), "accelerate": (1, 15), "deepspeed": (0, 19, 8),
}  # fmt: skip
"""What the engines were run with at the least; `pip install 'autotune-llm[train]'` brings it."""
_INSTALL = "pip install -U 'autotune-llm[train]'."


def installed() -> dict[str, str]:
    """Return the version of every installed distribution, by its name in lower case."""
    named = ((d.metadata["Name"], d.version) for d in distributions())
    return {str(name).lower().replace("_", "-"): version for name, version in named if name}


def check_versions(
    versions: Mapping[str, str], *, gpus: int, driver_cuda: tuple[int, int] | None = None
) -> list[Finding]:
    """Hold the installed versions against what is known to run and to clash.

    Args:
        versions: As `installed` returns them.
        gpus: Visible GPUs.
        driver_cuda: The newest CUDA version the driver runs.
    """
    found = []
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        found.append(
            warning("python", f"Python {sys.version.split()[0]}", "Python 3.11 to 3.13 were run.")
        )
    missing = [name for name in LOWEST if name not in versions]
    if missing:
        found.append(
            note("versions", f"not installed: {', '.join(missing)}",
                 "search and train need them: pip install 'autotune-llm[train]'.")
        )  # fmt: skip
    for name, lowest in LOWEST.items():
        if name in versions and _parts(versions[name]) < lowest:
            floor = ".".join(map(str, lowest))
            found.append(
                warning("versions", f"{name} {versions[name]} is older than {floor}", _INSTALL)
            )
    found += _torch_build(versions.get("torch", ""), gpus, driver_cuda)
    found += [each for each in _clashes(versions) if each is not None]
    if not any(finding.check in ("versions", "torch") for finding in found):
        listed = ", ".join(f"{name} {versions[name]}" for name in LOWEST)
        found.insert(0, ok("versions", listed))
    return found


def _torch_build(version: str, gpus: int, driver_cuda: tuple[int, int] | None) -> list[Finding]:
    if not version or not gpus:
        return []
    local = version.partition("+")[2]
    if local == "cpu":
        return [
            broken("torch", f"torch {version} is built without CUDA, and there are {gpus} GPUs",
                   "Install the CUDA build: pip install torch from its CUDA index.")
        ]  # fmt: skip
    match = re.fullmatch(r"cu(\d+)(\d)", local)
    if match and driver_cuda and (wanted := (int(match[1]), int(match[2])))[0] > driver_cuda[0]:
        have = ".".join(map(str, driver_cuda))
        return [
            broken("torch", f"torch {version} needs CUDA {wanted[0]}, the driver runs up to {have}",
                   "Update NVIDIA's driver, or install torch for an older CUDA.")
        ]  # fmt: skip
    return []


def _clashes(versions: Mapping[str, str]) -> list[Finding | None]:
    return [
        warning("clash", "pynvml and nvidia-ml-py both install the module pynvml",
                "pip uninstall pynvml; then pip install --force-reinstall nvidia-ml-py.")
        if {"pynvml", "nvidia-ml-py"} <= versions.keys() else None,
        note("clash", f"ring-flash-attn {versions['ring-flash-attn']}: its Hugging Face adapter "
             "does not import with transformers 5", "Axolotl's context parallelism stops on it; "
             "nothing here imports the adapter.")
        if "ring-flash-attn" in versions and _parts(versions.get("transformers", "0")) >= (5, 0)
        else None,
        warning("clash", f"peft {versions['peft']} with transformers "
                f"{versions.get('transformers')}", "peft 0.17 or newer goes with transformers 5.")
        if "peft" in versions and _parts(versions["peft"]) < (0, 17)
        and _parts(versions.get("transformers", "0")) >= (5, 0) else None,
    ]  # fmt: skip


def check_compiler(
    versions: Mapping[str, str], which: Callable[[str], str | None] = shutil.which
) -> list[Finding]:
    """Look for what DeepSpeed builds its operators with on first use."""
    if "deepspeed" not in versions:
        return []
    compiler = next((name for name in ("c++", "g++", "clang++") if which(name)), None)
    lacking = [name for name, there in (("a C++ compiler", compiler),
                                        ("ninja", which("ninja") or versions.get("ninja")))
               if not there]  # fmt: skip
    if lacking:
        return [
            broken("compiler", f"{' and '.join(lacking)} not found",
                   "apt install g++; pip install ninja: DeepSpeed builds CPU Adam (optimizer "
                   "offload) and its CPU communication on first use.")
        ]  # fmt: skip
    return [ok("compiler", f"{compiler} and ninja")]


def check_accelerate_file(machine: Machine, *, gpus: int) -> list[Finding]:
    """Look for accelerate's default config file: every `accelerate launch` without one takes it."""
    given = machine.variables.get("HF_HOME")
    home = machine.home / ".cache/huggingface" if given is None else machine.root / given
    for name in ("default_config.yaml", "default_config.yml", "default_config.json"):
        path = home / "accelerate" / name
        if path.is_file():
            break
    else:
        return [ok("accelerate_file", "no default config file")]
    text = path.read_text(errors="replace")
    stated = dict(re.findall(r"""^["'\s]*(\w+)["']?\s*:\s*["']?(\w+)""", text, re.MULTILINE))
    engine, ranks = stated.get("distributed_type", "?"), stated.get("num_processes", "?")
    seen = f"{path}: {engine} on {ranks} processes"
    do = (
        "accelerate launch and axolotl train take it wherever no file is named, autotune never "
        f"does. If it is of another job: rm {path}"
    )
    stale = gpus and ranks != str(gpus)
    return [(warning if stale else note)("accelerate_file", seen, do)]


def _parts(version: str) -> tuple[int, ...]:
    numbers = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in numbers[0].split(".")) if numbers else ()
