"""Models of families this package has no table of: counted in what transformers builds."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autotune.errors import AutotuneError
from autotune.resources import cache_dir
from autotune.spec.model.counted import Counted
from autotune.spec.model.families import FAMILIES
from autotune.spec.model.from_config import (
    describe_type,
    model_from_config,
    refuse_other_inputs,
    refuse_other_training,
    what_else,
)
from autotune.spec.model.shape import ModelSpec
from autotune.spec.model.tracer import (
    START_S,
    ask,
    can_trace,
    config_digest,
    needs_stack,
    stack_versions,
)

_LOG = logging.getLogger(__name__)

_LAYOUT = 1
"""Raised when a child counts otherwise: what is cached is then counted again."""


def model_of_any_family(
    name: str,
    config: Mapping[str, Any],
    *,
    weights: str | None = None,
    tokenizer: str | None = None,
) -> ModelSpec:
    """Read a config of a known family, or have a child process build and count the model.

    Raises:
        AutotuneError: transformers cannot build it, it is none that predicts the next token in
            text, or the training stack is missing.
    """
    if str(config.get("model_type")) in FAMILIES:
        return model_from_config(name, config, weights=weights, tokenizer=tokenizer)
    refuse_other_inputs(name, config, "Any text decoder that transformers can build is estimated.")
    refuse_other_training(name, config, weights)
    if other := what_else(config):
        raise AutotuneError(
            f"Model {name!r} has {describe_type(config)}{other}; only text decoders that predict "
            "the next token are estimated."
        )
    counted = _count(name, dict(config))
    classes = [str(cls) for cls in config.get("architectures") or ()]
    if config.get("auto_map") and classes and counted.causal_lm not in classes:
        raise AutotuneError(
            f"Model {name!r} is {classes[0]} from the code in its own repository (auto_map), which "
            f"is never run here; transformers itself builds {counted.causal_lm}."
        )
    return ModelSpec(
        name=name,
        architecture=str(config["model_type"]),
        num_layers=len(counted.layers),
        tied_embeddings=not counted.head,
        counted=counted,
        hf_config=dict(config),
        weights=weights,
        tokenizer=tokenizer,
        **counted.attributes,
    )


def _count(name: str, config: dict[str, Any]) -> Counted:
    stamp = json.dumps([config_digest(config), _LAYOUT, stack_versions()])
    file = cache_dir() / "models" / f"{hashlib.sha256(stamp.encode()).hexdigest()[:32]}.json"
    try:
        return Counted.model_validate_json(file.read_text())
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        _LOG.warning("%s cannot be read (%s): counted again.", file, type(error).__name__)
    if not can_trace():
        raise AutotuneError(needs_stack(name, str(config.get("model_type"))))
    _LOG.info("Counting the parameters of %s in the model itself ...", name)
    # What follows is a trace of the same model: its child has then started already.
    answered = ask({"config": config}, START_S, keep=True)
    if problem := answered.get("error") or answered.get("failure"):
        raise AutotuneError(f"Model {name!r}: {problem}")
    counted = Counted.model_validate(answered["model"])
    _keep(file, counted)
    return counted


def _keep(file: Path, counted: Counted) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as temporary:
            temporary.write(counted.model_dump_json())
        Path(temporary.name).replace(file)
    except OSError as error:
        _LOG.warning("What was counted cannot be kept in %s: %s.", file.parent, error)
