"""Published measurements as points, each with the setup its source states.

`published/*.csv` restate the figures with their sources; `use` says what a row is good for:
``scored`` (the configuration is stated fully), ``incomplete`` (predicted, reported apart),
``oom_stated`` (out of memory by the source's word), ``oom_inferred`` (it failed, and memory is the
likely reason) or ``left_out``, with the reason.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from foreign import Run
from points import Point

from autotune.memory.setup import (
    Attention,
    Checkpointing,
    Loss,
    Optimizer,
    Quantised,
    Regime,
    Setup,
    TraceKey,
)
from autotune.spec.catalogue import read_catalogue
from autotune.spec.hardware import load_hardware
from autotune.spec.workload import Lora
from autotune.units import GIB

FOLDER = Path(__file__).parent / "published"
SETS = ("fms_sft", "fsdp_qlora", "litgpt", "qwen1", "torchtune", "peft_l40s")
PREDICTED = ("scored", "incomplete", "oom_stated", "oom_inferred")
"""Values of `use` that are predicted."""

Row = dict[str, str]

# Bytes of a printed unit; Qwen's "G" is read as the GiB that torch and nvidia-smi count in.
_UNITS = {"GiB": GIB, "GB": 10**9, "G": GIB, "": GIB}


def read_rows() -> list[Row]:
    """Return all restated rows, the left-out ones too."""
    rows: list[Row] = []
    for name in SETS:
        with (FOLDER / f"{name}.csv").open(newline="", encoding="utf-8") as text:
            rows += [row | {"set": name} for row in csv.DictReader(text)]
    return rows


@cache
def _models() -> dict[str, Any]:
    own = yaml.safe_load((FOLDER / "models.yaml").read_text(encoding="utf-8"))
    return read_catalogue("models") | dict(own)


def config_of(row: Row) -> dict[str, Any]:
    """Return the Hugging Face config of a row's model."""
    config = dict(_models()[row["model"]]["config"])
    # LitGPT's head is a weight of its own in every model.
    untied = {"tie_word_embeddings": False} if row["set"] == "litgpt" else {}
    return config | untied


def gpu_memory_bytes(row: Row) -> int | None:
    """Return what a row's GPU holds, or None where the source or the catalogue does not say."""
    return _gpu_memory(row["gpu"])


@cache
def _gpu_memory(name: str) -> int | None:
    known = {key for file in ("gpus", "gpus_pcie", "gpus_rtx") for key in read_catalogue(file)}
    return load_hardware(name, 1).gpu.memory_bytes if name in known else None


def measured_bytes(row: Row) -> float | None:
    """Return the measured peak; None where the source has no figure."""
    return float(row["measured"]) * _UNITS[row["unit"]] if row["measured"] else None


# What a source calls a projection, by the family's module names.
_LITGPT = {"q": 0, "k": 1, "v": 2, "proj": 3, "mlp": 4, "head": 5}
_MODULES: dict[str, tuple[str, ...]] = {
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj up_proj down_proj", "lm_head"),
    "phi": ("q_proj", "k_proj", "v_proj", "dense", "fc1 fc2", "lm_head"),
    "phi3": ("qkv_proj", "qkv_proj", "qkv_proj", "o_proj", "gate_up_proj down_proj", "lm_head"),
    "gpt_neox": ("query_key_value",) * 3 + ("dense", "dense_h_to_4h dense_4h_to_h", "embed_out"),
}
_QWEN1 = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def lora_of(row: Row) -> Lora | None:
    """Return the adapter in the names of transformers' modules."""
    if not row["method"].startswith("lora"):
        return None
    targets = row["lora_targets"].split()
    if row["set"] == "litgpt":
        modules = _MODULES.get(config_of(row)["model_type"], _MODULES["llama"])
        named = [m for t in targets for m in modules[_LITGPT[t]].split()]
    elif row["set"] == "qwen1":
        named = list(_QWEN1)
    else:
        named = targets
    return Lora(r=int(row["lora_rank"]), alpha=16, target_modules=tuple(dict.fromkeys(named)))


_CHECKPOINTING = {
    "none": Checkpointing.NONE,
    # LitGPT's script for one GPU has no option for it.
    "": Checkpointing.NONE,
    # The Trainer's default until transformers 5 is the reentrant form.
    "full": Checkpointing.REENTRANT,
    "reentrant": Checkpointing.REENTRANT,
}
_OPTIMIZERS = {
    "adamw": Optimizer.ADAMW,
    "adamw_in_backward": Optimizer.ADAMW,
    "adamw_8bit_in_backward": Optimizer.ADAMW_8BIT,
    "": Optimizer.ADAMW,
}


# Their losses are traced; the others' are in `losses`.
_TRACED_LOSSES = {"fused_linear": Loss.FUSED_LINEAR, "chunked": Loss.CHUNKED}


def trace_key(row: Row) -> TraceKey:
    """Return what decides the activations of a row's run."""
    upcast = _upcasts_rest(row)
    regime = Regime.AUTOCAST if upcast or row["precision"].endswith("fp32") else Regime.COMPUTE
    return TraceKey(
        regime=regime,
        # A causal kernel without a mask, whatever its name; Gemma 2's soft cap needs the scores.
        attention=Attention.EAGER if row["model"].startswith("gemma-2-") else Attention.FLASH,
        windowed=_windowed(row),
        checkpointing=_CHECKPOINTING[row["checkpointing"]],
        loss=_TRACED_LOSSES.get(row["loss"], Loss.PLAIN),
        adapter=lora_of(row),
    )


def loss_of(row: Row) -> str:
    """Return the name of a row's loss in `losses`, or of one that is traced."""
    if row["model"] == "santacoder" and row["loss"] == "transformers":
        return "bigcode" if row["precision"].startswith("pure") else "bigcode autocast"
    if row["set"] == "fsdp_qlora":
        return "transformers held"
    return row["loss"]


def _windowed(row: Row) -> bool:
    window = config_of(row).get("sliding_window")
    return bool(window) and int(row["seq_len"] or 0) > window


def _upcasts_rest(row: Row) -> bool:
    """Say whether PEFT's k-bit preparation made norms and embeddings fp32; not under FSDP."""
    return row["kernels"] == "peft-kbit" and row["engine"] == "single"


def _kept_by_litgpt(row: Row) -> float:
    """Return what a layer of LitGPT keeps of a token beyond transformers' layer, in bytes.

    Read in litgpt 0.4 ``model.py`` and ``lora.py`` and bitsandbytes 0.41, and seen by
    `saved_tensors_hooks` on that code: values that are a view keep the whole fused projection, or
    keys and values are repeated for every query head; an update of some of q, k, v is padded and
    both are kept; the adapter's dropout keeps its mask; a 4-bit product keeps its input.
    """
    config = config_of(row)
    hidden = config["hidden_size"]
    heads = config["num_attention_heads"]
    queries = config.get("head_dim", hidden // heads) * heads
    values = queries * config.get("num_key_value_heads", heads) // heads
    kept = 2 * (queries + values) if queries == values else 4 * (queries - values)
    targets = [t for t in row["lora_targets"].split() if t in "qkv"]
    if 0 < len(targets) < 3:
        kept += 2 * sum(queries if t == "q" else values for t in targets)
    if row["method"] == "lora":
        kept += hidden
    if row["quantised"]:
        kept += 2 * (2 * hidden + config.get("intermediate_size", 4 * hidden))
    return float(kept)


def run_of(row: Row) -> Run:
    """Return a row's run.

    FSDP2 and ZeRO-3 of other tools, in incomplete rows alone, are taken as FSDP1.
    """
    sharded = row["engine"] in ("fsdp1", "fsdp2", "zero3")
    full = row["method"] == "full"
    # accelerate makes the flat parameters that train fp32 under mixed precision.
    upcast = row["engine"] == "fsdp1" and row["precision"].startswith("amp") and full
    litgpt = row["set"] == "litgpt"
    pure = row["precision"].startswith("pure")
    return Run(
        setup=Setup(
            key=trace_key(row),
            parameter_bytes=4 if upcast or row["precision"].endswith("fp32") else 2,
            optimizer=_OPTIMIZERS[row["optimizer"]],
            foreach=True,
            quantised=Quantised(row["quantised"]) if row["quantised"] else None,
            flat_units=row["engine"] == "fsdp1",
        ),
        fsdp1=sharded or row["engine"] == "fsdp1_no_shard",
        ranks=int(row["gpus"]) if sharded else 1,
        # LitGPT wraps its blocks alone.
        adapter_units=not (full or litgpt),
        micro_batch_size=int(row["micro_batch_size"]),
        seq_len=int(row["seq_len"]),
        # PEFT makes adapters of 16-bit models fp32; LitGPT's and fsdp_qlora's stay 16-bit.
        adapter_bytes=2 if litgpt or (pure and row["set"] == "fsdp_qlora") else 4,
        upcast_rest=_upcasts_rest(row),
        offload=row["offload"] == "parameters",
        unsynced_bytes=2 if litgpt and sharded and int(row["grad_accum_steps"] or 1) > 1 else 0,
        kept_by_tool=_kept_by_litgpt(row) if litgpt else 0.0,
    )


def points(rows: list[Row]) -> Iterator[Point]:
    """Yield the rows that have a figure and a length, for the peers."""
    for row in rows:
        if row["use"] not in PREDICTED or not row["seq_len"]:
            continue
        sharded = row["engine"] in ("fsdp1", "fsdp2", "zero2", "zero3")
        yield Point(
            id=row["id"],
            source=row["set"],
            config=config_of(row),
            measured_bytes=measured_bytes(row),
            metric=row["metric"],
            engine=row["engine"],
            world_size=int(row["gpus"]),
            shards=int(row["gpus"]) if sharded else 1,
            precision="pure" if row["precision"].startswith("pure") else "mixed",
            micro_batch_size=int(row["micro_batch_size"]),
            seq_len=int(row["seq_len"]),
            grad_accum_steps=int(row["grad_accum_steps"] or 1),
            checkpointing=row["checkpointing"] in ("full", "reentrant"),
            lora=lora_of(row),
            quantised=row["quantised"],
            offload=bool(row["offload"]),
            gpu=row["gpu"],
        )
