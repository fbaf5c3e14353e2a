"""Whether a study says anything about the cells asked about: model, GPU type and workload."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from autotune.errors import AutotuneError
from autotune.spec.model import NAMES_AND_PLACES, ModelSpec, model_from_config
from autotune.spec.workload import Workload


def check_model(study: str, contract: Mapping[str, Any], model: ModelSpec) -> None:
    """Refuse a study of another model.

    Raises:
        AutotuneError: it is one.
    """
    own = _section(contract, "model")
    name = own.get("name", "an unnamed model")
    if isinstance(own.get("config"), dict):
        measured = model_from_config(str(name), own["config"])
        same = measured.model_dump(exclude=NAMES_AND_PLACES) == model.model_dump(
            exclude=NAMES_AND_PLACES
        )
    else:
        same = own.get("num_parameters") == model.num_parameters
    if not same:
        raise AutotuneError(
            f"{study} measured {name}, not {model.name}: its factors hold for its own model. Give "
            f"a study of {model.name}, or leave --calibrate out."
        )


def matching_type(
    study: str, contract: Mapping[str, Any], nvml_names: Mapping[str, Sequence[str]]
) -> str:
    """Return which GPU type asked about the study measured on.

    Raises:
        AutotuneError: none of them.
    """
    device = str(_section(contract, "hardware").get("gpu", "an unknown GPU"))
    bare = device.removeprefix("NVIDIA ")
    for name, reported in nvml_names.items():
        if device == name or bare in reported:
            return name
    raise AutotuneError(
        f"{study} measured on {device}, which is not among --gpu-type {','.join(nvml_names)}: it "
        f"would correct no cell. Add {device} to --gpu-type, or leave --calibrate out."
    )


def measured_workload(study: str, contract: Mapping[str, Any], asked: Workload) -> Workload:
    """Return the study's workload; fields of a newer version are left out.

    Raises:
        AutotuneError: it has none, or one whose kernels are others than the one asked about.
    """
    own = {k: v for k, v in _section(contract, "workload").items() if k in Workload.model_fields}
    try:
        measured = Workload.model_validate(own) if own else None
    except ValidationError:
        measured = None
    if measured is None:
        raise AutotuneError(
            f"{study} does not say which workload it measured (study.json, 'workload'), so there "
            "is nothing to predict its trials by. Give another study, or leave --calibrate out."
        )
    there, here = _kernels(measured), _kernels(asked)
    differing = [
        f"{key} {there[key]} there, {here[key]} here" for key in here if there[key] != here[key]
    ]
    if differing:
        raise AutotuneError(
            f"{study} measured other kernels than asked about ({'; '.join(differing)}), so it "
            "would correct no cell. Ask about the study's own, or leave --calibrate out."
        )
    return measured


def _kernels(workload: Workload) -> dict[str, str]:
    """Return, in words, what decides which kernels run: a factor of others means nothing."""
    adapter = "none"
    if workload.adapter is not None:
        lora = workload.adapter
        adapter = f"r={lora.r} dropout={lora.dropout:g} on {','.join(lora.target_modules)}"
        adapter += " DoRA" * lora.dora
        adapter += f" over {lora.base_storage}" if lora.base_storage else ""
    return {
        "precision": str(workload.precision),
        "adapter": adapter,
        "packing": "on" if workload.packing else "off",
        "liger": ", ".join(workload.liger) or "none",
        "chunked loss": "on" if workload.chunked_loss else "off",
        "activation offloading": "on" if workload.activation_offloading else "off",
        "fp8": "on" if workload.fp8 else "off",
    }


def _section(contract: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = contract.get(name)
    return dict(found) if isinstance(found, dict) else {}


def differences(measured: Workload, asked: Workload) -> list[str]:
    """Name what of the study's workload differs; factors carry over less the more there is."""
    there, here = (w.model_dump(mode="json", exclude={"adapter"}) for w in (measured, asked))
    words = [
        f"{key} {_short(there.get(key))} there, {_short(here.get(key))} here"
        for key in dict.fromkeys([*here, *there])
        if there.get(key) != here.get(key)
    ]
    return [f"The study's workload differs: {'; '.join(words)}."] if words else []


def _short(value: object) -> str:
    return "none" if value is None else str(value)
