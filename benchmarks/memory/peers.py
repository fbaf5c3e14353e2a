"""What other estimators say of the same points.

Each peer is its own released code, called offline with the point's config. `report.py` writes their
answers to `peers.csv`, and why there is none to `peers_left_out.csv`.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from points import Point

from autotune.units import GIB

_MIB = 2**20


class CannotTake(Exception):
    """The peer has no answer for a point; the text says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """Another way to predict a peak."""

    name: str
    package: str
    """Distribution whose version is recorded; empty for a plain rule."""
    activations: bool
    """Whether it models activations."""
    predict: Callable[[Point], float]

    @property
    def version(self) -> str:
        """Version of its package; empty for a plain rule, and where it is not installed."""
        try:
            return version(self.package) if self.package else ""
        except PackageNotFoundError:
            return ""

    def ask(self, point: Point) -> float:
        """Return its prediction in bytes.

        Raises:
            CannotTake: it has none.
        """
        try:
            return self.predict(point)
        except ImportError as error:
            raise CannotTake(f"is not installed ({error.name})") from error


def _key(config: dict[str, Any]) -> str:
    return json.dumps(config, sort_keys=True)


@cache
def _meta_model(key: str) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    parsed = AutoConfig.for_model(**json.loads(key))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(parsed, dtype=torch.float32)


@cache
def _num_parameters(key: str) -> int:
    return sum(p.numel() for p in _meta_model(key).parameters())


@cache
def _largest_layer(key: str) -> int:
    """As DeepSpeed's `model_to_params` counts it: the largest module's own parameters."""
    modules = _meta_model(key).modules()
    return max(sum(p.numel() for p in m.parameters(recurse=False)) for m in modules)


def num_adapter_parameters(point: Point) -> int:
    """Count what LoRA adds, by the linear modules its targets match."""
    assert point.lora is not None
    total = 0
    for name, module in _meta_model(_key(point.config)).named_modules():
        weight = getattr(module, "weight", None)
        if name.split(".")[-1] in point.lora.target_modules and weight is not None:
            total += point.lora.r * sum(weight.shape)
    return total


def _accelerate(point: Point) -> float:
    """`accelerate estimate-memory`: its "training using Adam" column."""
    from accelerate.commands.estimate import estimate_training_usage
    from accelerate.utils.modeling import calculate_maximum_sizes

    if point.lora or point.quantised:
        raise CannotTake("knows no adapters and no quantised training")
    total, _ = calculate_maximum_sizes(_meta_model(_key(point.config)))
    precision = "float32" if point.precision == "fp32" else "bfloat16"
    return float(max(estimate_training_usage(total, precision).values()))


def _deepspeed(point: Point) -> float:
    """DeepSpeed's ``estimate_zero2/zero3_model_states_mem_needs``."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    if point.engine not in ("zero2", "zero3"):
        raise CannotTake("estimates ZeRO-2 and ZeRO-3 alone")
    if point.lora:
        raise CannotTake("counts every parameter as trained")
    key = _key(point.config)
    if point.engine == "zero2":
        _, device = estimate_zero2_model_states_mem_needs(
            _num_parameters(key), num_gpus_per_node=point.shards, cpu_offload=point.offload
        )
    else:
        _, device, _ = estimate_zero3_model_states_mem_needs(
            _num_parameters(key),
            _largest_layer(key),
            num_gpus_per_node=point.shards,
            cpu_offload=point.offload,
            cpu_offload_params=point.offload,
        )
    return float(device)


# Names in fitcheck's list of GPUs.
_FITCHECK_GPUS = {
    "a100-80gb": "a100-80", "a100-40gb": "a100-40", "rtx-3090": "3090", "rtx-4090": "4090",
    "a10g": "a10", "l40s": "l40s",
}  # fmt: skip


def _fitcheck(point: Point) -> float:
    """`fitcheck`: its total, without its overhead where the metric is the allocator's."""
    from fitcheck import ModelConfig, UnsupportedModelError, estimate, get_gpu
    from fitcheck import config_parser as parser

    if point.world_size > 1:
        raise CannotTake("takes one GPU")
    if point.quantised == "gptq":
        raise CannotTake("knows no GPTQ")
    if point.gpu not in _FITCHECK_GPUS:
        raise CannotTake("needs a GPU of its list")
    raw = point.config
    try:
        parser._reject_unsupported(raw, raw["model_type"])
        with contextlib.redirect_stderr(io.StringIO()):
            fields = parser._parse_fields(raw)
        # The Hub's parameter count, which it fetches, is the real model's.
        reported = _num_parameters(_key(raw))
        count = parser._reconcile_param_count(
            raw["model_type"], reported, parser._count_params(fields)
        )
        model = ModelConfig(
            name=raw["model_type"],
            num_params=count,
            **{name: getattr(fields, name) for name in fields.__dataclass_fields__},
        )
        report = estimate(model, _fitcheck_training(point), get_gpu(_FITCHECK_GPUS[point.gpu]))
    except (UnsupportedModelError, ValueError) as error:
        raise CannotTake(f"refuses: {str(error).split('. ')[0]}") from error
    overhead = report.overhead_mib if point.metric in ("allocated", "reserved") else 0.0
    return (report.total_mib - overhead) * _MIB


def _fitcheck_training(point: Point) -> Any:
    from fitcheck import TrainingConfig

    optimizer = {"adamw": "adamw", "adamw_8bit": "adam8bit"}.get(point.optimizer)
    if optimizer is None:
        raise CannotTake(f"knows no optimizer {point.optimizer}")
    lora = {"lora_rank": None}
    if point.lora:
        lora = {"lora_rank": point.lora.r, "lora_targets": list(point.lora.target_modules)}
    return TrainingConfig(
        precision="fp32" if point.precision == "fp32" else "bf16",
        quantization="nf4" if point.quantised else "none",
        double_quant=point.quantised == "nf4_double",
        optimizer=optimizer,
        batch_size=point.micro_batch_size,
        seq_len=point.seq_len,
        grad_checkpoint=point.checkpointing,
        flash_attn=point.flash,
        grad_accum_steps=point.grad_accum_steps,
        **lora,
    )


def _hf_vram_calc(point: Point) -> float:
    """`hf-vram-calc`: its training figure, or its LoRA figure."""
    from hf_vram_calc.calculator import VRAMCalculator
    from hf_vram_calc.config import ConfigManager

    calculator = VRAMCalculator(ConfigManager())
    count = _num_parameters(_key(point.config))
    dtype = "int4" if point.quantised else "fp32" if point.precision == "fp32" else "bf16"
    base = calculator.calculate_model_memory(count, dtype)
    if point.lora:
        gib = calculator.calculate_lora_memory(base, count, point.lora.r)
    else:
        gib = calculator.calculate_training_memory(base)
    return gib * GIB


def _sixteen_bytes(point: Point) -> float:
    """16 bytes a trained parameter, 2 (0.5 in 4 bits) a frozen one; sharded ones divided."""
    count = _num_parameters(_key(point.config))
    if point.lora:
        frozen = count * (0.5 if point.quantised else 2)
        total = frozen + 16 * num_adapter_parameters(point)
    else:
        total = 16 * count
    return total / (point.shards if point.engine in ("zero3", "fsdp1", "fsdp2") else 1)


PEERS = (
    Peer(name="accelerate", package="accelerate", activations=False, predict=_accelerate),
    Peer(name="deepspeed", package="deepspeed", activations=False, predict=_deepspeed),
    Peer(name="fitcheck", package="fitcheck-llm", activations=True, predict=_fitcheck),
    Peer(name="hf-vram-calc", package="hf-vram-calc", activations=False, predict=_hf_vram_calc),
    Peer(name="16 bytes", package="", activations=False, predict=_sixteen_bytes),
)
