"""Where calibrations are kept: one file a machine and number of ranks, in the user's cache."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from autotune.errors import AutotuneError
from autotune.memory.fingerprint import machine_fingerprint
from autotune.resources import cache_dir
from autotune.spec.hardware import HardwareSpec
from autotune.timing.calibration import Calibration

_LOG = logging.getLogger(__name__)
_NOT_SPEED = "estimator"
"""The part of a fingerprint that says how memory is predicted, not how fast the machine is."""


def calibration_file(fingerprint: dict[str, Any], num_ranks: int) -> Path:
    """Return the file of a machine's calibration with so many ranks."""
    marks = json.dumps(speed_marks(fingerprint), sort_keys=True)
    digest = hashlib.sha256(marks.encode()).hexdigest()[:12]
    return _folder() / f"{digest}-{num_ranks}.json"


def speed_marks(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a fingerprint says how fast the machine is."""
    return {key: value for key, value in fingerprint.items() if key != _NOT_SPEED}


def _folder() -> Path:
    return cache_dir() / "calibrations"


def save_calibration(calibration: Calibration, path: Path | None = None) -> Path:
    """Write a calibration, whole or not at all; into the cache unless a path is given.

    In the cache, models and engines that an earlier sweep measured and this one did not are kept.

    Raises:
        AutotuneError: the file cannot be written.
    """
    if path is None:
        path = calibration_file(calibration.fingerprint, calibration.num_ranks)
        calibration = merged(calibration, read_calibration(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(calibration.model_dump_json(indent=1) + "\n")
        os.replace(temporary, path)
    except OSError as error:
        raise AutotuneError(
            f"The calibration cannot be written to {path} ({error.strerror}). Give another --out."
        ) from error
    return path


def read_calibration(path: Path) -> Calibration | None:
    """Read a kept calibration; None without one. A damaged file is set aside, and said."""
    try:
        return Calibration.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValidationError, ValueError):
        aside = path.with_name(f"{path.name}.damaged-{os.getpid()}")
        path.rename(aside)
        _LOG.warning(
            "The calibration %s was damaged and set aside as %s. Measure again: "
            "autotune doctor --measure.", path, aside,
        )  # fmt: skip
    except OSError as error:
        _LOG.warning("The calibration %s cannot be read (%s).", path, error.strerror)
    return None


def calibration_for(hardware: HardwareSpec) -> Calibration | None:
    """Return what was measured of this machine, where that is the hardware asked about.

    A sweep measures the links of one host, so there is none for several.
    """
    if hardware.num_nodes > 1 or not _folder().is_dir():
        return None
    try:
        machine = machine_fingerprint("cpu" if hardware.gpu.is_cpu else "cuda")
    except AutotuneError:  # no GPU here: a prediction for another machine
        return None
    if machine.gpu != hardware.gpu.name:
        return None
    return read_calibration(calibration_file(machine.to_dict(), hardware.num_gpus))


def merged(new: Calibration, old: Calibration | None) -> Calibration:
    """Return the new calibration with the models and engines that only the old one has."""
    if old is None:
        return new
    models = {(m.model, m.regime, m.packing): m for m in (*old.models, *new.models)}
    engines = {
        (e.model, e.precision, e.packing, e.strategy): e for e in (*old.engines, *new.engines)
    }
    return new.model_copy(
        update={"models": tuple(models.values()), "engines": tuple(engines.values())}
    )
