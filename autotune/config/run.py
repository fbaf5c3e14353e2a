"""`load_config`: an Axolotl YAML, written by hand or by `autotune search`, into a `RunConfig`."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autotune.config.adapters import LORA_KEYS, read_adapter
from autotune.config.block import AutotuneBlock, read_block
from autotune.config.canonical import canonical_keys
from autotune.config.combinations import check_combinations
from autotune.config.datasets import (
    read_data_settings,
    read_datasets,
    read_pretraining_datasets,
)
from autotune.config.deepspeed import BatchContract, EngineSettings, read_deepspeed
from autotune.config.fsdp import read_fsdp
from autotune.config.kernels import read_kernels
from autotune.config.keys import (
    AUTOTUNE_KEY,
    check_known,
    check_nested,
    key_catalogue,
    unused_warning,
)
from autotune.config.layout import Layout, build_plan, read_layout
from autotune.config.presets import find_deepspeed
from autotune.config.reading import read_yaml_mapping
from autotune.config.sharding import Sharding
from autotune.config.training import (
    read_optimizer,
    read_precision,
    read_torch_compile,
    read_train_settings,
)
from autotune.config.values import Section, shorten
from autotune.errors import AutotuneError
from autotune.plan import Engine, Plan
from autotune.spec.model import ModelSpec, load_model
from autotune.spec.training import DatasetSource, DataSettings, TrainSettings
from autotune.spec.workload import Workload

_LOG = logging.getLogger(__name__)
_DEFAULT_SEQUENCE_LEN = 512
_DEFAULT_OUTPUT_DIR = "./model-out"
_DEFAULT_SEED = 42


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A configuration file, read and checked; `plan` lays it out on a number of GPUs.

    Two are equal when they train alike and keep the same keys, wherever their files lie.
    """

    path: Path = field(compare=False, repr=False)
    base_model: str
    """As written in the file, or the path from here where it lies beside the file."""
    model: ModelSpec
    sharding: Sharding
    layout: Layout
    train: TrainSettings
    datasets: tuple[DatasetSource, ...]
    test_datasets: tuple[DatasetSource, ...]
    data: DataSettings
    output_dir: str
    seed: int
    autotune: AutotuneBlock
    passthrough: Mapping[str, Any]
    """Known Axolotl keys that are not used here: today's names, values as in the file."""
    warnings: tuple[str, ...] = field(compare=False, repr=False)
    contract: Workload
    """The workload of one data-parallel group; `workload_on` has the global batch."""

    def plan(self, num_gpus: int) -> Plan:
        """Return the plan the file's Axolotl keys describe, on `num_gpus` ranks.

        The block `autotune:` takes no part in it, so a file edited by hand trains what it says.

        Raises:
            AutotuneError: the parallel sizes do not multiply to `num_gpus`.
        """
        return build_plan(self.sharding, self.layout, num_gpus, str(self.path))

    def workload_on(self, num_gpus: int) -> Workload:
        """Return the workload with the global batch that `num_gpus` ranks make of the file.

        Axolotl's micro batch and accumulation count per data-parallel group, so the same file
        has a global batch twice as large on twice the GPUs.
        """
        size = self.plan(num_gpus).global_batch_size
        return self.contract.model_copy(update={"global_batch_size": size})

    @property
    def workload(self) -> Workload:
        """The workload on the GPUs the file names, or on one data-parallel group.

        The number of GPUs comes from `num_gpus`, where that is known.
        """
        num_gpus = self.num_gpus
        return self.contract if num_gpus is None else self.workload_on(num_gpus)

    @property
    def num_gpus(self) -> int | None:
        """Number of GPUs the file itself implies: its explicit mesh, or the one measured on."""
        layout = self.layout
        if layout.dp_shard is not None and layout.dp_replicate is not None:
            return layout.dp_shard * layout.dp_replicate * layout.cp * layout.tp
        if self.sharding.engine is not Engine.FSDP2:
            explicit = layout.dp_shard if self.sharding.engine is Engine.DEEPSPEED else (
                layout.dp_replicate)  # fmt: skip
            if explicit is not None:
                return explicit * layout.cp * layout.tp
        return self.autotune.num_gpus


def load_config(
    path: Path, overrides: Mapping[str, Any] | None = None, *, any_family: bool = False
) -> RunConfig:
    """Read an Axolotl configuration; what is not used is named once, on the log `autotune`.

    Args:
        path: Of the YAML file.
        overrides: Top-level keys that count in place of the file's own, as flags of a command do.
        any_family: Whether a model will do whose family was not checked in training.

    Raises:
        AutotuneError: a missing or malformed file, an unknown key (with the nearest known one), a
            value that is not allowed, or a setting that is not run here.
    """
    given = read_yaml_mapping(path) | dict(overrides or {})
    return read_config(given, path, any_family=any_family)


def read_config(given: Mapping[str, Any], path: Path, *, any_family: bool = False) -> RunConfig:
    """Read the keys of an Axolotl configuration, wherever they come from; see `load_config`.

    Args:
        given: The keys of the file.
        path: What to call them in messages; relative paths in them may lie beside it.
        any_family: Whether a model will do whose family was not checked in training.
    """
    where = str(path)
    catalogue = key_catalogue()
    check_known(given, catalogue.top_level, where)
    check_nested(given, catalogue.nested_keys, where)
    values, deprecation = canonical_keys(given, where)
    check_combinations(values, where)
    top = Section(values, where)
    base_model, model = _read_model(top, path.parent, where, any_family=any_family)
    layout = read_layout(top, where, model)
    precision = read_precision(top)
    max_grad_norm = top.number("max_grad_norm")
    batch = BatchContract(
        micro_batch_size=layout.micro_batch_size,
        grad_accum_steps=layout.grad_accum_steps,
        max_grad_norm=max_grad_norm,
        precision=precision,
        hidden_size=model.hidden_size,
    )
    engine = _read_engine(top, path.parent, where, batch)
    train = read_train_settings(
        top,
        max_grad_norm=engine.max_grad_norm if max_grad_norm is None else max_grad_norm,
        torch_compile=read_torch_compile(top, engine),
        where=where,
    )
    datasets = read_datasets(top, "datasets", path.parent, where)
    datasets += read_pretraining_datasets(top, path.parent, where)
    test_datasets = read_datasets(top, "test_datasets", path.parent, where)
    if test_datasets and train.val_set_size:
        raise AutotuneError(f"{where}: test_datasets and val_set_size exclude each other.")
    kernels = read_kernels(top, where)
    contract = Workload(
        seq_len=top.integer("sequence_len", _DEFAULT_SEQUENCE_LEN, minimum=2),
        global_batch_size=layout.micro_batch_size * layout.grad_accum_steps,
        optimizer=read_optimizer(top),
        precision=precision,
        packing=top.boolean("sample_packing", False),
        adapter=read_adapter(top, where, tuple(model.linears), precision),
        liger=kernels.liger,
        chunked_loss=kernels.chunked_loss,
        activation_offloading=kernels.activation_offloading,
        fp8=kernels.fp8,
        fp8_all_gather=kernels.fp8_all_gather,
    )
    data = read_data_settings(top)
    block = read_block(top.raw(AUTOTUNE_KEY), where)
    output_dir = top.text("output_dir", _DEFAULT_OUTPUT_DIR)
    seed = top.integer("seed", _DEFAULT_SEED)
    if seed >= 2**32:
        raise top.error("seed", f"NumPy takes whole numbers from 0 to {2**32 - 1}.")
    passthrough = top.unread()
    passthrough |= kernels.kept
    idle = kernels.explained | (set() if contract.adapter else set(LORA_KEYS))
    unused = unused_warning(passthrough, where, idle=idle)
    warnings = [
        note for note in (*engine.sharding.warnings, deprecation, kernels.warning, unused) if note
    ]
    if warnings:
        _LOG.warning("%s", "\n".join(warnings))
    return RunConfig(
        path=path,
        base_model=base_model,
        model=model,
        sharding=engine.sharding,
        layout=layout,
        train=train,
        datasets=tuple(datasets),
        test_datasets=tuple(test_datasets),
        data=data,
        output_dir=output_dir,
        seed=seed,
        autotune=block,
        passthrough=passthrough,
        warnings=tuple(warnings),
        contract=contract,
    )


def _read_model(
    top: Section, folder: Path, where: str, *, any_family: bool
) -> tuple[str, ModelSpec]:
    name = top.text("base_model")
    if not name:
        raise AutotuneError(f"{where}: base_model is missing. Give a model's name or folder.")
    if not os.path.exists(name) and os.path.exists(folder / name):
        name = str(folder / name)
    try:
        # Whoever writes a file to train from means the weights, as `best.yml` of a search does.
        model = load_model(name, published=True, any_family=any_family)
    except (OSError, RuntimeError, ValueError) as error:  # no path: too long, a NUL, an unknown ~
        raise AutotuneError(
            f"{where}: base_model: {shorten(repr(name), 200)} cannot be read: "
            f"{shorten(str(error), 200)}. Give a model's name or folder."
        ) from None
    tokenizer = top.text("tokenizer_config")
    return name, model.model_copy(update={"tokenizer": tokenizer}) if tokenizer else model


def _read_engine(top: Section, folder: Path, where: str, batch: BatchContract) -> EngineSettings:
    fsdp = read_fsdp(top, where)
    given = top.raw("deepspeed")
    if given is not None:
        values, label = find_deepspeed(given, folder, where)
        return read_deepspeed(values, label, batch)
    return EngineSettings(
        sharding=fsdp or Sharding(engine=Engine.DDP), max_grad_norm=None, torch_compile=False
    )
