"""A DeepSpeed file as a `Strategy`: what a search measures when it is told of one."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autotune.config.deepspeed import AUTO, BatchContract, read_deepspeed
from autotune.config.presets import find_deepspeed
from autotune.config.values import Section
from autotune.errors import AutotuneError
from autotune.spec.model import ModelSpec
from autotune.spec.strategy import Strategy, load_strategies
from autotune.spec.workload import Precision

_LOG = logging.getLogger(__name__)
# What a search varies, so that a file may not fix it.
_VARIED = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")


def strategy_from_deepspeed(value: str, model: ModelSpec, precision: Precision) -> Strategy:
    """Return the strategy of a DeepSpeed file or preset; what a search leaves out is named.

    Args:
        value: A path, from the working directory, or the name of a shipped preset.
        model: Sizes the "auto" buckets.
        precision: What the search trains in; the file must agree.

    Returns:
        The shipped strategy that shards alike, or one named by the same scheme.

    Raises:
        AutotuneError: no such file, a batch size in it that is not "auto", a sequence-parallel
            degree, or what `load_config` refuses of it.
    """
    values, label = find_deepspeed(value, Path(), "--deepspeed")
    for key in _VARIED:
        if values.get(key, AUTO) not in (None, AUTO):
            raise AutotuneError(
                f'{label}: {key}: {values[key]!r}: a search varies it. Write "auto".'
            )
    _check_mesh(values, label)
    contract = BatchContract(
        micro_batch_size=1,
        grad_accum_steps=1,
        max_grad_norm=None,
        precision=precision,
        hidden_size=model.hidden_size,
    )
    settings = read_deepspeed(values, label, contract)
    sharding = settings.sharding
    left_out = {
        "torch_compile": settings.torch_compile,
        "gradient_clipping": settings.max_grad_norm is not None,
        "reduce_bucket_size": bool(sharding.bucket_elements),
    }
    notes = list(sharding.warnings)
    if any(left_out.values()):
        named = ", ".join(key for key, given in left_out.items() if given)
        notes.append(f"{label}: a search measures without its {named}.")
    if notes:
        _LOG.warning("%s", "\n".join(notes))
    name = sharding.strategy_name(dp_replicate=1)
    shipped = next((strategy for strategy in load_strategies() if strategy.name == name), None)
    return shipped or Strategy.model_validate(
        {
            "name": name,
            "summary": f"DeepSpeed as {label} says.",
            "engine": sharding.engine,
            "zero_stage": sharding.zero_stage,
            "offload_optimizer": sharding.offload_optimizer,
            "offload_params": sharding.offload_params,
            "hpz": sharding.hpz,
        }
    )


def _check_mesh(values: Mapping[str, Any], label: str) -> None:
    """Refuse what DeepSpeed makes its mesh of: a search decides it."""
    degree = Section(values, label).integer("sequence_parallel_size", 1, minimum=1)
    if degree > 1:
        raise AutotuneError(
            f"{label}: sequence_parallel_size: {degree}: a search varies it. Remove it and give "
            f"the degrees, divisors of --gpus, with --sequence-parallel {degree}; or start from "
            "the whole file with --from."
        )
    if values.get("data_parallel_size", AUTO) not in (None, AUTO):
        raise AutotuneError(
            f"{label}: data_parallel_size: {values['data_parallel_size']!r}: it follows from "
            "--gpus and the sequence-parallel degree. Remove it."
        )
