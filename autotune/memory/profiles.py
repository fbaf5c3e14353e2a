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
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from autotune.errors import AutotuneError
from autotune.memory.profile import ActivationProfile
from autotune.memory.profile_json import key_text, key_to_json, profile_from_json
from autotune.memory.setup import TraceKey
from autotune.resources import cache_dir
from autotune.spec.model import ModelSpec
from autotune.spec.model.tracer import (
    START_S,
    ask,
    can_trace,
    config_digest,
    needs_stack,
    stack_versions,
)

_LOG = logging.getLogger(__name__)

TRACER_VERSION = 1
"""Raised when a change of the tracer changes profiles: what is cached is then traced again."""
_KEY_S = 60
"""Limit of a key; it takes 2 to 5 s."""
_KEYS_WORTH_A_CHILD = 5
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
    stamp = json.dumps([digest, key_text(key), TRACER_VERSION, stack_versions()])
    return cache_dir() / "profiles" / f"{hashlib.sha256(stamp.encode()).hexdigest()[:32]}.json"


def _from_trace(
    model: ModelSpec, digest: str, keys: Sequence[TraceKey]
) -> dict[TraceKey, ActivationProfile]:
    if not can_trace():
        return {}
    _LOG.log(
        # Few are there at once; for many a user would wonder.
        logging.WARNING if len(keys) > _KEYS_WORTH_A_CHILD else logging.INFO,
        "Tracing the memory of %s under fake tensors: %d variants, some seconds each, kept for the "
        "next time ...", model.name, len(keys),
    )  # fmt: skip
    profiles = {}
    try:
        traced = _trace_in_children(model.hf_config, keys)
    except TraceFailure as failure:
        if model.counted is not None:
            raise
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
    request = {"config": config, "keys": [*map(key_to_json, keys)]}
    answered = ask(request, START_S + _KEY_S * len(keys))
    if "failure" in answered:
        raise TraceFailure(f"Tracing what the model allocates failed ({answered['failure']}).")
    if "error" in answered:
        raise AutotuneError(answered["error"])
    return list(answered["profiles"])


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

    if model.counted is not None:
        raise AutotuneError(needs_stack(model.name, model.architecture))

    return {key: closed_form_profile(model, key) for key in keys}
