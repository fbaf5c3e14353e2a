"""A configuration that was read, as an Axolotl configuration again."""

from __future__ import annotations

from typing import Any

from autotune.config.kernels import with_kept
from autotune.config.layout import Layout
from autotune.config.run import RunConfig
from autotune.config.sharding import Sharding
from autotune.emit.axolotl_keys import (
    comment,
    data_keys,
    data_settings_keys,
    ring_keys,
    schedule_keys,
    workload_keys,
    yaml_text,
)
from autotune.plan import Engine, Recompute
from autotune.spec.model import load_model


def emit_run_config(config: RunConfig) -> str:
    """Return the YAML text of a configuration, under today's names, with what is not used kept.

    `load_config` reads it back to an equal `RunConfig`, from any folder as long as the working
    directory stays. The DeepSpeed mapping stands in the file itself. Comments are lost.
    """
    keys: dict[str, Any] = {"base_model": config.base_model}
    if config.model.tokenizer != load_model(config.base_model).tokenizer:
        keys["tokenizer_config"] = config.model.tokenizer
    keys |= data_keys(config.datasets, config.test_datasets, config.train)
    keys |= data_settings_keys(config.data)
    keys |= workload_keys(config.contract)
    keys |= _layout_keys(config.layout, packed=config.contract.packing)
    keys |= _engine_keys(config.sharding)
    keys |= schedule_keys(config.train)
    keys |= {"output_dir": config.output_dir, "seed": config.seed}
    keys = with_kept(keys, config.passthrough)
    block = config.autotune.model_dump(mode="json", exclude_defaults=True)
    if block:
        keys["autotune"] = block
    return comment([f"From {config.path.name}, in the keys of today's Axolotl."]) + yaml_text(keys)


def _layout_keys(layout: Layout, *, packed: bool) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "micro_batch_size": layout.micro_batch_size,
        "gradient_accumulation_steps": layout.grad_accum_steps,
        "gradient_checkpointing": layout.recompute is Recompute.FULL,
    }
    if layout.cp > 1:
        keys["context_parallel_size"] = layout.cp
        keys |= ring_keys(layout, packed=packed)
    if layout.tp > 1:
        keys["tensor_parallel_size"] = layout.tp
    sizes = {"dp_shard_size": layout.dp_shard, "dp_replicate_size": layout.dp_replicate}
    return keys | {key: size for key, size in sizes.items() if size is not None}


def _engine_keys(sharding: Sharding) -> dict[str, Any]:
    if sharding.engine is Engine.DEEPSPEED:
        return {"deepspeed": dict(sharding.config)}
    if sharding.engine is Engine.FSDP2:
        return {"fsdp_version": 2, "fsdp_config": dict(sharding.config)}
    return {}
