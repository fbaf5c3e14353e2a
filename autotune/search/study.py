"""The study folder: its contract, its lock, its outputs."""

from __future__ import annotations

import fcntl
import itertools
import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from autotune import __version__
from autotune.errors import AutotuneError
from autotune.folders import make_folder
from autotune.search.content import data_digest, tokenizer_digest
from autotune.search.space import Space
from autotune.search.start import Start
from autotune.spec.hardware import HardwareSpec, cpu_name
from autotune.spec.model import ModelSpec
from autotune.spec.training import DatasetSource
from autotune.spec.workload import Workload
from autotune.trial.data_counts import DataCounts
from autotune.trial.folder import LAUNCHES
from autotune.trial.protocol import RankResult, rank_result_file, read_message
from autotune.trial.store import RECORDS_FILE

_LOG = logging.getLogger(__name__)
CONTRACT_FILE = "study.json"
SUMMARY_FILE = "summary.json"
SPACE_FILE = "space.json"
_LOCK_FILE = ".lock"
_FILES = (
    CONTRACT_FILE, SPACE_FILE, SUMMARY_FILE, RECORDS_FILE, "study.journal", LAUNCHES,
    "trials.csv", "report.html", "confirmations.jsonl", "fork-server.log",
)  # fmt: skip
"""What a search may leave before its first record."""
_VERSIONED = ("torch", "transformers", "accelerate", "deepspeed", "optuna")
_UNCOMPARED = {"command", "created", "name"}
"""Fields of the contract that may differ between a study and the command that resumes it."""


@dataclass(frozen=True, kw_only=True)
class Contract:
    """Everything that makes measurements of one study comparable."""

    model: ModelSpec
    base_model: str
    """As the user called it."""
    workload: Workload
    hardware: HardwareSpec
    device: str
    strategies: Sequence[str]
    micro_batches: Sequence[int] | None
    cp_degrees: Sequence[int]
    recompute: Sequence[str]
    memory_limit_bytes: int | None
    datasets: Sequence[DatasetSource]
    seed: int
    sampler: str
    """What chose the order of the trials: another would go on from what it would not have asked."""
    cp_backends: Sequence[str] = ()
    """How sequences are split; none given: as their heads allow."""
    tp_degrees: Sequence[int] = (1,)
    start: Start | None = None
    """The configuration the search starts from, which is in its space."""

    @cached_property
    def _digests(self) -> tuple[list[str | None], str | None]:
        """Of each data set and of the tokenizer, read once: the data may be large."""
        contents = [data_digest(source.path) for source in self.datasets]
        return contents, tokenizer_digest(self.model.tokenizer)

    def to_dict(self, name: str) -> dict[str, Any]:
        """Return the JSON form that `study.json` holds."""
        contents, tokenizer = self._digests
        return {
            "schema_version": 1,
            "name": name,
            "command": shlex.join(["autotune", *sys.argv[1:]]),
            "model": {
                "name": self.base_model,
                "num_parameters": self.model.num_parameters,
                "config": self.model.hf_config,
                **({"tokenizer": tokenizer} if tokenizer else {}),
            },
            "workload": self.workload.model_dump(mode="json"),
            "hardware": {
                "device": self.device,
                "gpu": self.hardware.gpu.name,
                "num_gpus": self.hardware.num_gpus,
                "memory_bytes": self.hardware.gpu.memory_bytes,
                "fingerprint": fingerprint(self.hardware),
            },
            "strategies": list(self.strategies),
            "micro_batches": list(self.micro_batches) if self.micro_batches else None,
            "cp_degrees": list(self.cp_degrees),
            **({"cp_backends": list(self.cp_backends)} if self.cp_backends else {}),
            # Left out at its default: older studies have no word for it.
            **({"tp_degrees": list(self.tp_degrees)} if list(self.tp_degrees) != [1] else {}),
            "recompute": list(self.recompute),
            "memory_limit_bytes": self.memory_limit_bytes,
            "datasets": [
                source.model_dump(mode="json", exclude_none=True) | {"content": content}
                for source, content in zip(self.datasets, contents, strict=True)
            ],
            "seed": self.seed,
            "sampler": self.sampler,
            **({"start": self.start.to_dict()} if self.start else {}),
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "versions": _versions(),
        }


def data_counts(folder: Path) -> DataCounts | None:
    """Return what the trials of a study read, as the first of them that got so far counted it."""
    for path in sorted((folder / LAUNCHES).glob(f"*/{rank_result_file(0)}")):
        counts = read_message(RankResult, path).data
        if counts is not None:
            return counts
    return None


def fingerprint(hardware: HardwareSpec) -> str:
    """Return a text that is equal on machines whose measurements may be compared."""
    name = cpu_name() if hardware.gpu.is_cpu else ""
    cpu = f"{name}, " if name else ""
    cores = len(os.sched_getaffinity(0))
    nodes = f" on {hardware.num_nodes} nodes" if hardware.num_nodes > 1 else ""
    return f"{hardware.num_gpus} x {hardware.gpu.name}{nodes}, {cpu}{cores} cores"


def check_folder(folder: Path, contract: Contract) -> bool:
    """Say whether the folder holds this very study; touch nothing.

    Else it is free, or holds another study that measured nothing: `open_study` replaces that.

    Raises:
        AutotuneError: it holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise AutotuneError(f"{folder} is a file. Give a new folder with --out.")
    for source in contract.datasets:
        if folder.resolve().is_relative_to(Path(source.path).resolve()):
            raise AutotuneError(
                f"{folder} lies in the data folder {source.path}, so the study's own files would "
                "be read as data. Give a folder elsewhere with --out."
            )
    file = folder / CONTRACT_FILE
    if not file.exists():
        if folder.is_dir() and any(path.name != _LOCK_FILE for path in folder.iterdir()):
            raise AutotuneError(
                f"{folder} is not empty and holds no study. Give a new folder with --out."
            )
        return False
    held, wanted = _read(file), contract.to_dict(folder.resolve().name)
    differ = [
        key
        for key in sorted(set(held) | set(wanted))
        if key not in _UNCOMPARED and _comparable(held.get(key)) != _comparable(wanted.get(key))
    ]
    if differ and not _has_records(folder):
        return False
    if differ:
        shown = "; ".join(_difference(key, held.get(key), wanted.get(key)) for key in differ[:3])
        raise AutotuneError(
            f"{folder} holds another study ({shown}). Its results were left as they are. "
            "Give a new folder with --out, or the study's own command to resume it."
        )
    return True


def open_study(folder: Path, contract: Contract) -> bool:
    """Start a study in the folder, or resume the one that is there; see `check_folder`.

    Returns:
        Whether it is resumed.
    """
    resumed = check_folder(folder, contract)
    if not resumed:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / CONTRACT_FILE).exists():
            _set_aside(folder)
        write_json(folder / CONTRACT_FILE, contract.to_dict(folder.resolve().name))
    return resumed


def kept_space(folder: Path) -> Space | None:
    """Return the families of the study in a folder; None where it has not made them yet.

    Raises:
        AutotuneError: the file was damaged.
    """
    file = folder / SPACE_FILE
    if not file.exists():
        return None
    try:
        return TypeAdapter(Space).validate_json(file.read_bytes())
    except ValidationError as error:
        raise AutotuneError(
            f"{file} cannot be read: it holds the micro batches of each family of the study. "
            "Restore it, or search again in another --out."
        ) from error


def _has_records(folder: Path) -> bool:
    records = folder / RECORDS_FILE
    return records.exists() and records.stat().st_size > 0


def _set_aside(folder: Path) -> None:
    """Move the files of a study out of the way of the one that takes its place."""
    names = (folder / f"replaced-{number}" for number in itertools.count(1))
    aside = next(path for path in names if not path.exists())
    aside.mkdir()
    for name in _FILES:
        if (folder / name).exists():
            (folder / name).rename(aside / name)
    _LOG.warning("The study in %s had measured nothing; its files are in %s.", folder, aside)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the study for this process alone; the kernel frees the lock when the process dies.

    Raises:
        AutotuneError: another search works in the folder, or it cannot be made.
    """
    make_folder(folder, "--out")
    with (folder / _LOCK_FILE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise AutotuneError(
                f"Another search is running in {folder}. Wait for it, or give another --out."
            ) from error
        yield


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _read(file: Path) -> dict[str, Any]:
    try:
        held = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise AutotuneError(
            f"{file} is not readable JSON ({error}). Give a new folder with --out."
        ) from error
    if not isinstance(held, dict):
        raise AutotuneError(f"{file} is not a study. Give a new folder with --out.")
    return held


def _comparable(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _difference(key: str, held: Any, wanted: Any) -> str:
    if isinstance(held, dict) and isinstance(wanted, dict):
        inner = [k for k in sorted(set(held) | set(wanted)) if held.get(k) != wanted.get(k)]
        return "; ".join(
            f"{key}.{name} is {_short(held.get(name))} there, {_short(wanted.get(name))} here"
            for name in inner[:3]
        )
    return f"{key} is {_short(held)} there, {_short(wanted)} here"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _versions() -> dict[str, str]:
    found = {"autotune": __version__, "python": sys.version.split()[0]}
    for name in _VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
