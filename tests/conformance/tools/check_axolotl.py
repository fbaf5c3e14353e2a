"""Gives files to Axolotl's own validation, and to its own layout of ranks."""

import importlib.machinery
import json
import sys
import types

# Axolotl looks whether ring_flash_attn, a package for CUDA alone, can be imported.
stub = types.ModuleType("ring_flash_attn")
stub.__spec__ = importlib.machinery.ModuleSpec("ring_flash_attn", None)
sys.modules["ring_flash_attn"] = stub

import yaml  # noqa: E402
from axolotl.utils.config import prepare_plugins, validate_config  # noqa: E402
from axolotl.utils.dict import DictDefault  # noqa: E402
from axolotl.utils.distributed import _get_parallel_config_kwargs  # noqa: E402

CAPABILITIES = {"bf16": True, "fp8": True, "tf32": True, "n_node": 1, "compute_capability": "sm_90"}


def answer(question):
    with open(question["file"]) as file:
        config = DictDefault(yaml.safe_load(file))
    try:
        prepare_plugins(config)
        read = validate_config(
            config,
            capabilities=CAPABILITIES | {"n_gpu": question["ranks"]},
            env_capabilities={"torch_version": "2.11.0"},
        )
        mesh = _get_parallel_config_kwargs(
            question["ranks"],
            read.tensor_parallel_size,
            read.context_parallel_size,
            read.dp_shard_size,
            read.dp_replicate_size,
            bool(read.fsdp_config),
        )
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {
        "error": None,
        "mesh": mesh,
        "micro_batch_size": read.micro_batch_size,
        "grad_accum_steps": read.gradient_accumulation_steps,
        "recompute": bool(read.gradient_checkpointing),
        "fsdp": dict(read.fsdp_config) if read.fsdp_config else None,
        "deepspeed": bool(read.deepspeed),
    }


if __name__ == "__main__":
    with open(sys.argv[1]) as questions:
        answers = [answer(question) for question in json.load(questions)]
    with open(sys.argv[2], "w") as out:
        json.dump(answers, out, default=str)
