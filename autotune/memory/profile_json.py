"""`ActivationProfile` and `TraceKey` as JSON: for a child process, the cache, what is shipped."""

from __future__ import annotations

import json
from typing import Any

from autotune.errors import AutotuneError
from autotune.memory.profile import FEATURES, ActivationProfile, Instant, LayerKind, Phase
from autotune.memory.setup import Attention, Checkpointing, Float8, Loss, Regime, TraceKey
from autotune.spec.workload import Lora

FORMAT = 1
"""Of the JSON; another one is not read."""

_PHASES = (
    "embedding_forward", "head_forward", "loss_forward", "loss_backward", "head_backward",
    "embedding_backward", "evaluation",
)  # fmt: skip


def key_to_json(key: TraceKey) -> dict[str, Any]:
    """Return a key's JSON form, without what changes no allocation: an adapter's scale."""
    adapter = key.adapter
    # Younger than what is shipped, so only where there is one: other keys keep their text.
    younger: dict[str, Any] = {"gathered": list(key.gathered)} if any(key.gathered) else {}
    if key.float8 is not None:
        younger["float8"] = key.float8.value
    return younger | {
        "regime": key.regime.value,
        "packed": key.packed,
        "attention": key.attention.value,
        "exchanged": key.exchanged,
        "single": key.single,
        "windowed": key.windowed,
        "checkpointing": key.checkpointing.value,
        "loss": key.loss.value,
        "fused_kernels": key.fused_kernels,
        "adapter": adapter
        and {
            "r": adapter.r,
            "dropout": adapter.dropout > 0,
            "target_modules": sorted(adapter.target_modules),
            **({"dora": True} if adapter.dora else {}),
        },
    }


def key_text(key: TraceKey) -> str:
    """Return a key as one line: equal for keys that allocate alike."""
    return json.dumps(key_to_json(key), sort_keys=True, separators=(",", ":"))


def key_from_json(data: dict[str, Any]) -> TraceKey:
    """Return the key of `key_to_json`'s form."""
    adapter = data["adapter"]
    return TraceKey(
        regime=Regime(data["regime"]),
        packed=data["packed"],
        attention=Attention(data["attention"]),
        exchanged=data["exchanged"],
        single=data["single"],
        gathered=tuple(data.get("gathered", (0, 0))),
        windowed=data["windowed"],
        checkpointing=Checkpointing(data["checkpointing"]),
        loss=Loss(data["loss"]),
        fused_kernels=data["fused_kernels"],
        adapter=adapter
        and Lora(
            r=adapter["r"],
            dropout=0.1 if adapter["dropout"] else 0.0,
            target_modules=tuple(adapter["target_modules"]),
            dora=adapter.get("dora", False),
        ),
        float8=Float8(data["float8"]) if "float8" in data else None,
    )


def profile_to_json(profile: ActivationProfile) -> dict[str, Any]:
    """Return a profile's JSON form."""
    return {
        "format": FORMAT,
        "source": profile.source,
        "versions": dict(profile.versions),
        "kinds": [
            {
                "forward": _phase_to_json(kind.forward),
                "backward": _phase_to_json(kind.backward),
                "parameter_elements": kind.parameter_elements,
                "trainable_elements": kind.trainable_elements,
            }
            for kind in profile.kinds
        ],
        "layers": list(profile.layers),
    } | {name: _phase_to_json(getattr(profile, name)) for name in _PHASES}


def profile_from_json(data: Any) -> ActivationProfile:
    """Return the profile of `profile_to_json`'s form.

    Raises:
        AutotuneError: another format, or something that is no profile.
    """
    try:
        if data["format"] != FORMAT:
            raise AutotuneError(f"A profile of format {data['format']}, not {FORMAT}.")
        kinds = tuple(
            LayerKind(
                forward=_phase_from_json(kind["forward"]),
                backward=_phase_from_json(kind["backward"]),
                parameter_elements=int(kind["parameter_elements"]),
                trainable_elements=int(kind["trainable_elements"]),
            )
            for kind in data["kinds"]
        )
        layers = tuple(int(kind) for kind in data["layers"])
        if not layers or not set(layers) <= set(range(len(kinds))):
            raise ValueError("layers of no kind")
        return ActivationProfile(
            source=str(data["source"]),
            kinds=kinds,
            layers=layers,
            versions=tuple((str(k), str(v)) for k, v in data["versions"].items()),
            **{name: _phase_from_json(data[name]) for name in _PHASES},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise AutotuneError(f"Not an activation profile: {error!r}.") from error


def _phase_to_json(phase: Phase) -> dict[str, Any]:
    return {
        "end": [_short(x) for x in phase.end],
        "gradients": phase.gradient_elements,
        "peaks": [
            [*map(_short, peak.bytes), peak.gradient_elements, peak.operator]
            for peak in phase.peaks
        ],
    }


def _short(number: float) -> float:
    return int(number) if number.is_integer() else number


def _phase_from_json(data: dict[str, Any]) -> Phase:
    peaks = []
    for *coefficients, gradients, operator in data["peaks"]:
        peaks.append(Instant(_polynomial(coefficients), int(gradients), str(operator)))
    return Phase(_polynomial(data["end"]), tuple(peaks), int(data["gradients"]))


def _polynomial(coefficients: list[Any]) -> tuple[float, ...]:
    if len(coefficients) != len(FEATURES):
        raise ValueError(f"{len(coefficients)} coefficients, not {len(FEATURES)}")
    return tuple(float(x) for x in coefficients)
