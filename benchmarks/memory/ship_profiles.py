"""Trace every model of the catalogue and write the profiles that ship with the package.

Run it again after a change of the tracer or with newer libraries: ``make profiles``. A model whose
file is up to date is left alone, so an interrupted run goes on where it stopped.
"""

import argparse
import gzip
import json
import sys
import time
from pathlib import Path

import autotune.memory
from autotune.memory.profile_json import key_text
from autotune.memory.profiles import TRACER_VERSION, config_digest, trace_in_child
from autotune.memory.setup import Checkpointing, Regime, TraceKey
from autotune.spec.catalogue import read_catalogue
from autotune.spec.model import ModelSpec, load_model
from autotune.spec.workload import Lora

SHIPPED = Path(autotune.memory.__file__).parent / "shipped"
SHORTEST = 2048
"""Sequences below this are traced when somebody asks."""
CHECKPOINTING = {
    Regime.COMPUTE: (Checkpointing.NONE, Checkpointing.FULL, Checkpointing.REENTRANT),
    Regime.FSDP: (Checkpointing.NONE, Checkpointing.FULL),
    Regime.AUTOCAST: (Checkpointing.NONE, Checkpointing.FULL),
}


def keys_of(model: ModelSpec) -> list[TraceKey]:
    """What the default spaces of `search` and `plan` ask for, in bf16."""
    lora = Lora(target_modules=tuple(model.linears))
    variants: list[dict[str, object]] = [
        {"packed": True}, {"packed": False}, {"packed": True, "adapter": lora},
    ]  # fmt: skip
    if model.num_heads % 2 == model.num_kv_heads % 2 == 0:
        variants += [{"packed": True, "exchanged": True, "single": s} for s in (False, True)]
    window = model.sliding_window if model.num_window_layers else None
    windowed = (False,) if window is None else (True,) if window < SHORTEST else (False, True)
    return [
        TraceKey(regime=regime, checkpointing=checkpointing, windowed=shorter, **variant)
        for variant in variants
        for regime, all_checkpointing in CHECKPOINTING.items()
        for checkpointing in all_checkpointing
        for shorter in windowed
    ]


def ship(name: str) -> None:
    model = load_model(name)
    stamp = {"digest": config_digest(model.hf_config), "tracer": TRACER_VERSION}
    file = SHIPPED / f"{name}.json.gz"
    data = stamp | {"keys": {}, "profiles": []}
    if file.exists():
        old = json.loads(gzip.decompress(file.read_bytes()))
        data = old if old | stamp == old else data
    keys = [key for key in keys_of(model) if key_text(key) not in data["keys"]]
    if not keys:
        return
    start = time.monotonic()
    profiles, numbers = data["profiles"], data["keys"]
    for key, profile in zip(keys, trace_in_child(model.hf_config, keys), strict=True):
        if profile not in profiles:
            profiles.append(profile)
        numbers[key_text(key)] = profiles.index(profile)
    SHIPPED.mkdir(exist_ok=True)
    text = json.dumps(data, separators=(",", ":"))
    file.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))
    print(
        f"{name}: {len(keys)} more keys, {len(profiles)} profiles, "
        f"{file.stat().st_size / 1024:.0f} KiB in {time.monotonic() - start:.0f} s",
        file=sys.stderr,
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help="of the catalogue; all without")
    for name in parser.parse_args().models or read_catalogue("models"):
        ship(name)


if __name__ == "__main__":
    main()
