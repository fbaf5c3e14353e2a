"""Find a model's activation profile: shipped, cached, traced by a child process, or closed form.

The trace runs the model's own code, so it needs the training stack and some seconds; this process
never imports it.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from autotune.errors import AutotuneError
from autotune.memory.profile import ActivationProfile
from autotune.memory.profile_json import key_text, key_to_json, profile_from_json
from autotune.memory.setup import TraceKey
from autotune.resources import cache_dir
from autotune.spec.model import ModelSpec

_LOG = logging.getLogger(__name__)

TRACER_VERSION = 1
"""Raised when a change of the tracer changes profiles: what is cached is then traced again."""
TRACE_VARIABLE = "AUTOTUNE_TRACE"
"""Environment variable: ``off`` traces nothing, what is not shipped or cached is closed form."""
_STACK = ("torch", "transformers", "accelerate", "peft")
_START_S, _KEY_S = 120, 60
"""Limits of a trace; it takes some 10 s to start and 2 to 5 s a key."""
_KEYS_WORTH_A_CHILD = 5
# What a config says of its files, not of its model.
_NOT_THE_MODEL = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures"}

_found: dict[tuple[str, str], ActivationProfile] = {}


class TraceFailure(AutotuneError):
    """The trace of a model that can be trained went wrong."""


def activation_profile(model: ModelSpec, key: TraceKey) -> ActivationProfile:
    """Return the profile of one key; see `activation_profiles`."""
    return activation_profiles(model, [key])[key]


def activation_profiles(
    model: ModelSpec, keys: Iterable[TraceKey]
) -> dict[TraceKey, ActivationProfile]:
    """Return the profile of each key, in the fewest seconds that give it.

    Raises:
        AutotuneError: transformers cannot build the model, or, without the training stack, the
            closed form does not know it.
    """
    asked = {key: _with_own_targets(model, key) for key in keys}
    digest = config_digest(model.hf_config)
    for look in (_from_shipped, _from_cache, _from_trace, _from_closed_form):
        missing = {
            text: key for key in asked.values() if (digest, text := key_text(key)) not in _found
        }
        if missing:
            for key, profile in look(model, digest, list(missing.values())).items():
                _found[digest, key_text(key)] = profile
    return {key: _found[digest, key_text(own)] for key, own in asked.items()}


def _with_own_targets(model: ModelSpec, key: TraceKey) -> TraceKey:
    """Leave out of an adapter the projections the model has not; PEFT passes over them as well."""
    if key.adapter is None:
        return key
    own = tuple(name for name in key.adapter.target_modules if name in model.linears)
    return replace(key, adapter=key.adapter.model_copy(update={"target_modules": own}))


def config_digest(config: dict[str, Any]) -> str:
    """Return what tells models apart: of the config without what names its files."""
    told = {k: v for k, v in config.items() if k not in _NOT_THE_MODEL}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]


def _from_shipped(
    model: ModelSpec, digest: str, keys: Sequence[TraceKey]
) -> dict[TraceKey, ActivationProfile]:
    shipped = _read_shipped(model.name)
    if shipped.get("digest") != digest:
        return {}
    numbers, profiles = shipped["keys"], shipped["profiles"]
    return {
        key: profile_from_json(profiles[numbers[key_text(key)]])
        for key in keys
        if key_text(key) in numbers
    }


@cache
def _read_shipped(name: str) -> dict[str, Any]:
    file = files("autotune.memory") / "shipped" / f"{name}.json.gz"
    if "/" in name or not file.is_file():
        return {}
    return json.loads(gzip.decompress(file.read_bytes()))  # type: ignore[no-any-return]


def _from_cache(
    model: ModelSpec, digest: str, keys: Sequence[TraceKey]
) -> dict[TraceKey, ActivationProfile]:
    found = {}
    for key in keys:
        file = _cache_file(digest, key)
        try:
            found[key] = profile_from_json(json.loads(file.read_text()))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, AutotuneError) as error:
            _set_aside(file, error)
    return found


def _set_aside(file: Path, error: Exception) -> None:
    aside = file.with_suffix(".corrupt")
    try:
        file.replace(aside)
    except OSError:
        aside = file
    _LOG.warning("%s cannot be read (%s): set aside as %s, traced again.", file, error, aside.name)


def _cache_file(digest: str, key: TraceKey) -> Path:
    stamp = json.dumps([digest, key_text(key), TRACER_VERSION, _versions()])
    return cache_dir() / "profiles" / f"{hashlib.sha256(stamp.encode()).hexdigest()[:32]}.json"


@cache
def _versions() -> tuple[str, ...]:
    return tuple(map(_version, _STACK))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _from_trace(
    model: ModelSpec, digest: str, keys: Sequence[TraceKey]
) -> dict[TraceKey, ActivationProfile]:
    off = os.environ.get(TRACE_VARIABLE, "").lower() in ("off", "0")
    if off or not all(map(find_spec, ("torch", "transformers", "accelerate"))):
        return {}
    _LOG.info(
        "Tracing the memory of %s under fake tensors (%d variants) ...", model.name, len(keys)
    )
    profiles = {}
    try:
        traced = _trace_in_children(model.hf_config, keys)
    except TraceFailure as failure:
        _LOG.warning("%s Counting what its family allocates instead.", failure)
        return {}
    for key, data in zip(keys, traced, strict=True):
        profiles[key] = profile_from_json(data)
        _write(_cache_file(digest, key), data)
    return profiles


def _trace_in_children(config: dict[str, Any], keys: Sequence[TraceKey]) -> list[Any]:
    """Split many keys over processes; a few are not worth another one's start."""
    count = max(1, min(len(keys) // _KEYS_WORTH_A_CHILD, (os.cpu_count() or 1) // 2))
    shares = [keys[i::count] for i in range(count)]
    with ThreadPoolExecutor(count) as pool:
        answers = list(pool.map(partial(trace_in_child, config), shares))
    return [answers[i % count][i // count] for i in range(len(keys))]


def trace_in_child(config: dict[str, Any], keys: Sequence[TraceKey]) -> list[Any]:
    """Trace in a process of its own; return the profiles' JSON forms.

    Raises:
        AutotuneError: the model cannot be built, or is none that can be trained.
        TraceFailure: it can be, but the trace went wrong.
    """
    with tempfile.TemporaryDirectory(prefix="autotune-trace-") as folder:
        request, answer = Path(folder, "request.json"), Path(folder, "answer.json")
        request.write_text(json.dumps({"config": config, "keys": [*map(key_to_json, keys)]}))
        try:
            child = subprocess.run(
                [sys.executable, "-m", "autotune.runner.trace", str(request), str(answer)],
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=_START_S + _KEY_S * len(keys),
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise TraceFailure(
                f"Tracing what the model allocates took over {error.timeout:.0f} s and was stopped."
            ) from error
        if not answer.is_file():
            said = child.stderr.decode(errors="replace").strip().splitlines()[-1:]
            answered = {"failure": " ".join(said) or f"it ended with {child.returncode}"}
        else:
            answered = json.loads(answer.read_text())
    if "failure" in answered:
        raise TraceFailure(f"Tracing what the model allocates failed ({answered['failure']}).")
    if "error" in answered:
        raise AutotuneError(answered["error"])
    return list(answered["profiles"])


def _environment() -> dict[str, str]:
    package_parent = str(Path(__file__).resolve().parents[2])
    paths = filter(None, [package_parent, os.environ.get("PYTHONPATH")])
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        # Nothing is computed: no device, no threads, nothing to download.
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def _write(file: Path, data: Any) -> None:
    """Keep a profile for the next time; without a place for it, trace again then."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as temporary:
            json.dump(data, temporary)
        Path(temporary.name).replace(file)
    except OSError as error:
        _LOG.warning("The traced profile cannot be kept in %s: %s.", file.parent, error)


def _from_closed_form(
    model: ModelSpec, digest: str, keys: Sequence[TraceKey]
) -> dict[TraceKey, ActivationProfile]:
    from autotune.memory.closed_form import closed_form_profile

    return {key: closed_form_profile(model, key) for key in keys}
