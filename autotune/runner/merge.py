"""Merge a trained adapter into its base: ``python -m autotune.runner.merge ORDER`` (JSON).

Runs on the CPU of one process. The base is read in the type its files have, also where it was
trained in 4 bits: the adapter is added to the weights themselves, not to their quantised copy.
"""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from autotune.errors import AutotuneError
from autotune.runner.models import add_adapter
from autotune.spec.workload import Lora
from autotune.trial.adapters import DCP_FOLDER, SAVED_WEIGHTS, MergeOrder

_MODEL = "model."  # what accelerate puts before every name in its sharded checkpoints
_ADAPTER = "default"
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja",
              "special_tokens_map.json", "vocab.json", "merges.txt")  # fmt: skip


def merge(order: MergeOrder) -> dict[str, Any]:
    """Write the merged model into `order.out`, an empty folder; return what was merged.

    Raises:
        AutotuneError: weights that cannot be read, or that do not fit one another.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = _load_base(order.base)
    adapter = Path(order.adapter)
    if (adapter / SAVED_WEIGHTS).is_file():
        try:
            model = PeftModel.from_pretrained(base, str(adapter), torch_device="cpu")
        except SafetensorError as error:  # neither an OSError nor a ValueError
            raise AutotuneError(
                f"{adapter / SAVED_WEIGHTS} is not whole: {error}. Give another checkpoint."
            ) from error
        except (OSError, RuntimeError, ValueError) as error:  # no file; other sizes; no adapter
            raise AutotuneError(
                f"The adapter in {adapter} does not go on {order.base}: "
                f"{str(error).splitlines()[0]}. Give the base it was trained on by --base."
            ) from error
        _check_every_layer(model, adapter, order.base)
    else:
        assert order.lora is not None
        model = add_adapter(base, Lora.model_validate(order.lora))
        _load_sharded(model, adapter / DCP_FOLDER)
    layers = sum(isinstance(module, BaseTunerLayer) for module in model.modules())
    merged = model.merge_and_unload(safe_merge=True)
    merged.save_pretrained(order.out)
    _copy_tokenizer(order)
    return {"layers": layers, "dtype": str(merged.dtype).removeprefix("torch.")}


def _check_every_layer(model: Any, adapter: Path, base: str) -> None:
    """Refuse a base of more or fewer layers, or other names: PEFT only warns of those."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    with safe_open(adapter / SAVED_WEIGHTS, framework="pt") as file:
        held = {name for name in file.keys() if ".lora_" in name}
    for names, whose in ((wanted - held, "the adapter has none for"), (held - wanted, "no place")):
        if names:
            raise AutotuneError(
                f"The adapter in {adapter} does not go on {base}: {len(names)} weights differ "
                f"({whose}: {min(names)}). Give the base it was trained on by --base."
            )


def _load_base(base: str) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            base, dtype="auto", local_files_only=Path(base).is_dir()
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise AutotuneError(
            f"The base {base} cannot be read: {str(error).splitlines()[0]} Give it by --base, a "
            "local folder or a Hub id."
        ) from error


def _load_sharded(model: Any, folder: Path) -> None:
    """Read the adapter's weights alone from a sharded checkpoint of FSDP2, on one process."""
    import torch.distributed.checkpoint as dcp

    reader = dcp.FileSystemReader(folder)
    try:
        held = reader.read_metadata().state_dict_metadata
    except (OSError, EOFError, pickle.UnpicklingError) as error:  # saving ended before its index
        raise _not_whole(folder, error) from error
    own = {name: p for name, p in model.named_parameters() if f".{_ADAPTER}" in name}
    names = {name: _name_in(held, name) for name in own}
    missing = [name for name, found in names.items() if found is None]
    if missing:
        raise AutotuneError(
            f"{folder} lacks {missing[0]} and {len(missing) - 1} more of the adapter's weights. "
            "Give another checkpoint."
        )
    read = {found: torch.empty(own[name].shape, dtype=held[found].properties.dtype)
            for name, found in names.items()}  # fmt: skip
    try:
        dcp.load(read, storage_reader=reader, no_dist=True)
    except dcp.api.CheckpointException as error:  # a BaseException; a part is missing or cut short
        first = next(iter(error.failures.values()))[0]
        raise _not_whole(folder, first) from error
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(read[names[name]])


def _not_whole(folder: Path, error: BaseException) -> AutotuneError:
    words = (str(error).splitlines() or [type(error).__name__])[0]
    return AutotuneError(f"{folder} is not whole: {words}. Give another checkpoint.")


def _name_in(held: Any, name: str) -> str | None:
    """Return a parameter's name in a checkpoint: as it is, or as PEFT writes it in its files.

    There it lacks the adapter's own name, and DoRA's lengths are no module's `weight`.
    """
    plain = name.replace(f".{_ADAPTER}", "")
    forms = (name, plain, plain.removesuffix(".weight"))
    return next((_MODEL + form for form in forms if _MODEL + form in held), None)


def _copy_tokenizer(order: MergeOrder) -> None:
    """Put the tokenizer of the run, or else of the base, beside the merged weights."""
    places = [Path(folder) for folder in (order.run, order.base) if folder]
    for folder in places:
        found = [folder / name for name in _TOKENIZER if (folder / name).is_file()]
        for file in found:
            (Path(order.out) / file.name).write_bytes(file.read_bytes())
        if found:
            return


def main() -> None:
    """Merge, and answer by one JSON document."""
    order = MergeOrder.model_validate_json(sys.argv[1])
    try:
        answer = merge(order)
    except AutotuneError as error:
        answer = {"error": str(error)}
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
