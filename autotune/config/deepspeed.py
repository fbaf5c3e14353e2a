"""What a DeepSpeed mapping says, and what of it runs here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autotune.config.keys import check_known, check_nested, key_catalogue
from autotune.config.sharding import Sharding
from autotune.config.values import Section
from autotune.errors import AutotuneError
from autotune.plan import Engine
from autotune.spec.workload import Precision

COMPILE_KEY = "torch_compile"
"""Ours: DeepSpeed ignores top-level keys it does not know, and has none for torch.compile."""
AUTO = "auto"
_MISSING = object()

# Keys that switch on another algorithm than the one measured here.
_OTHER_ALGORITHMS = (
    "amp", "torch_autocast", "compression_training", "data_efficiency",
    "curriculum_learning", "progressive_layer_drop", "expert_parallel", "hybrid_engine",
    "sparse_gradients", "tensor_parallel", "weight_quantization", "zenflow", "optimizer",
    "scheduler", "prescale_gradients",
)  # fmt: skip
_OTHER_ZERO_ALGORITHMS = (
    "zenflow", "zero_quantized_weights", "zero_quantized_gradients",
    "zero_quantized_nontrainable_weights", "elastic_checkpoint", "legacy_stage1",
)  # fmt: skip

# What a run fixes so that two strategies differ by their names alone: the values of
# `autotune.emit.deepspeed`, and DeepSpeed's defaults. Either spelling of the stage-3 keys counts.
_FIXED_ZERO: dict[str, object] = {
    "allgather_partitions": True,
    "contiguous_gradients": True,
    "reduce_scatter": True,
    "round_robin_gradients": False,
    "sub_group_size": 10**9,
    "max_live_parameters": 10**9,
    "max_reuse_distance": 10**9,
    "gather_16bit_weights_on_model_save": True,
}
# Neither speed, memory nor result: overlap follows from the device, and files rightly carry either.
_QUIET = frozenset({
    "comet", "comms_logger", "csv_monitor", "deepspeed_version", "disable_python_gc", "dump_state",
    "flops_profiler", "log_level", "memory_breakdown", "steps_per_print", "tensorboard", "timers",
    "wall_clock_breakdown", "wandb", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
})  # fmt: skip
"""What only reports, or is decided by the optimizer here."""
_NO_MATTER = ("overlap_comm", "log_trace_cache_warnings", "enable_sanity_checks")


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchContract:
    """What the YAML says about the numbers a DeepSpeed JSON may repeat."""

    micro_batch_size: int
    grad_accum_steps: int
    max_grad_norm: float | None
    """None when the YAML does not say, so the JSON may."""
    precision: Precision
    hidden_size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSettings:
    """What an engine's own mapping decides."""

    sharding: Sharding
    max_grad_norm: float | None
    """None when the mapping does not say."""
    torch_compile: bool
    """It asks for torch.compile; false says nothing."""


def read_deepspeed(
    values: Mapping[str, Any], where: str, contract: BatchContract
) -> EngineSettings:
    """Read a DeepSpeed mapping: its sharding, and the clipping and compiling it states, if any.

    What would change the numerics, or the algorithm, and is not run here is refused. What only
    moves time or memory (buckets that differ from one another, overlap switches) is fixed by the
    tool and named in a warning.

    Raises:
        AutotuneError: an unknown key, a contradiction to the YAML, or a setting not run here.
    """
    catalogue = key_catalogue()
    check_known(values, catalogue.deepspeed_keys | {COMPILE_KEY}, where)
    check_nested(values, catalogue.deepspeed_sections, where)
    top = Section(values, where)
    for key in _OTHER_ALGORITHMS:
        if _is_on(top.raw(key)):
            raise top.error(key, "It is not run here: remove it; optimizer, schedule and precision "
                                 "belong in the YAML.")  # fmt: skip
    _check_batch(top, contract)
    _check_precision(top, contract.precision)
    zero = top.section("zero_optimization")
    if zero is None:
        raise AutotuneError(f"{where}: zero_optimization is missing. Give it a stage of 1, 2 or 3.")
    compiled, warnings = _compiled(top)
    config = {key: value for key, value in values.items() if key not in ("compile", COMPILE_KEY)}
    if compiled:
        config[COMPILE_KEY] = True
    clipping = _clipping(top, contract)
    unused = [key for key, value in top.unread().items() if _is_on(value) and key not in _QUIET]
    if unused:
        warnings = [*warnings, f"{where}: kept, but not used here: {', '.join(sorted(unused))}."]
    return EngineSettings(
        sharding=_read_zero(zero, where, contract, config, warnings),
        max_grad_norm=clipping,
        torch_compile=compiled,
    )


def _compiled(top: Section) -> tuple[bool, list[str]]:
    """Return whether torch.compile is asked for: by our key, or by the block of old versions."""
    ours = top.boolean(COMPILE_KEY, False)
    block = top.section("compile")
    if block is None:
        return ours, []
    check_known(block.unread(), key_catalogue().compile_keys, block.where)
    if block.boolean("deepcompile", False):
        raise block.error("deepcompile", "DeepCompile is not run here; torch.compile is: write "
                          "torch_compile: true into the YAML.")  # fmt: skip
    if not any(block.has(key) for key in ("disable", "backend")):
        return ours, []
    asked = not block.boolean("disable", False)
    block.text("backend", "inductor", choices=("inductor",))
    warning = (
        f"{block.where}: DeepSpeed from 0.18 on rejects a file with disable or backend here. It is "
        f"read as torch_compile: {str(asked or ours).lower()}, which belongs in the YAML."
    )
    return asked or ours, [warning]


def _read_zero(
    zero: Section,
    where: str,
    contract: BatchContract,
    config: Mapping[str, Any],
    warnings: list[str],
) -> Sharding:
    values = zero.unread()
    check_known(values, key_catalogue().zero_keys, f"{where}: zero_optimization")
    stage = zero.integer("stage", 0)
    if stage not in (1, 2, 3):
        raise zero.error("stage", "Allowed: 1, 2, 3. Without sharding, remove `deepspeed`: DDP.")
    for key in _OTHER_ZERO_ALGORITHMS:
        if _is_on(zero.raw(key)):
            raise zero.error(key, "It is not run here: remove it.")
    hpz = zero.integer("zero_hpz_partition_size", 1)
    if hpz > 1 and stage != 3:
        raise zero.error("zero_hpz_partition_size", "Only stage 3 gathers parameters: use stage 3, "
                         "or remove it.")  # fmt: skip
    if _is_on(zero.raw("cpu_offload")) or _is_on(zero.raw("cpu_offload_param")):
        raise AutotuneError(
            f"{where}: zero_optimization: cpu_offload is DeepSpeed's old spelling. "
            'Write "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}.'
        )
    offload_params = _offloaded(zero, "offload_param")
    if offload_params and stage != 3:
        raise zero.error("offload_param", "Only stage 3 shards parameters and can offload them.")
    bucket, bucket_warnings = _buckets(zero, where, contract.hidden_size)
    warnings = [*warnings, *bucket_warnings]
    offload_optimizer = _offloaded(zero, "offload_optimizer")
    differing = _differing(zero, contract.hidden_size)
    if differing:
        warnings.append(f"{where}: zero_optimization: set by autotune, not by the file: "
                        f"{', '.join(differing)}.")  # fmt: skip
    return Sharding(
        engine=Engine.DEEPSPEED,
        zero_stage=stage,
        offload_optimizer=offload_optimizer,
        offload_params=offload_params,
        bucket_elements=bucket,
        hpz=max(1, hpz),
        config=config,
        warnings=tuple(warnings),
    )


def _differing(zero: Section, hidden_size: int) -> list[str]:
    """Return the keys nobody has read whose values differ from those of a run."""
    fixed = _FIXED_ZERO | {"param_persistence_threshold": 10 * hidden_size}
    return sorted(
        key
        for key, value in zero.unread().items()
        if value not in (None, AUTO)
        and key not in _NO_MATTER
        and value != fixed.get(key.removeprefix("stage3_"), _MISSING)
    )


def _offloaded(zero: Section, key: str) -> bool:
    section = zero.section(key)
    if section is None:
        return False
    check_known(section.unread(), key_catalogue().offload_keys, section.where)
    device = section.text("device", "none")
    if device not in ("none", "cpu"):
        raise section.error("device", "Allowed: none, cpu.")
    if device == "cpu" and (section.number("ratio", 1.0) != 1.0 or section.raw("super_offload")):
        raise zero.error(key, "Partial and super offload are not run here: remove ratio and "
                              "super_offload.")  # fmt: skip
    return device == "cpu"


def _buckets(zero: Section, where: str, hidden_size: int) -> tuple[int, list[str]]:
    """Return the plan's bucket (0 for "auto") and a warning where the three sizes differ.

    `reduce_bucket_size` decides: it is the one all three stages use and the one that the
    Hugging Face "auto" fills for all of them.
    """
    reduce = _bucket(zero, "reduce_bucket_size")
    gather = _bucket(zero, "allgather_bucket_size")
    prefetch = _bucket(zero, "stage3_prefetch_bucket_size", "prefetch_bucket_size")
    size = reduce or hidden_size**2
    differing = [name for name, value in (("allgather_bucket_size", gather),
                                          ("stage3_prefetch_bucket_size", prefetch))
                 if value not in (0, size)]  # fmt: skip
    if not differing:
        return reduce, []
    return reduce, [
        f"{where}: zero_optimization: one bucket size of {size} elements is used for all buckets; "
        f"{', '.join(differing)} of the file is not used."
    ]


def _bucket(zero: Section, *names: str) -> int:
    for name in names:
        if zero.has(name):
            if zero.raw(name) == AUTO:
                return 0
            return zero.integer(name, 0, minimum=1)
    return 0


def _check_batch(top: Section, contract: BatchContract) -> None:
    expected = {
        "train_micro_batch_size_per_gpu": ("micro_batch_size", contract.micro_batch_size),
        "gradient_accumulation_steps": ("gradient_accumulation_steps", contract.grad_accum_steps),
    }
    for key, (yaml_key, value) in expected.items():
        if top.raw(key, AUTO) != AUTO and top.integer(key) != value:
            raise top.error(key, f'The YAML says {yaml_key}: {value}. Write "auto" here.')
    if top.raw("train_batch_size", AUTO) != AUTO:
        size = top.integer("train_batch_size", 0)
        if size % (contract.micro_batch_size * contract.grad_accum_steps):
            raise top.error("train_batch_size", 'It follows from the YAML. Write "auto" here.')


def _check_precision(top: Section, precision: Precision) -> None:
    fp16 = top.section("fp16")
    if fp16 and _is_on(fp16.raw("enabled")):
        raise fp16.error("enabled", "fp16 is not run here: use bf16: true in the YAML.")
    for key in ("bf16", "bfloat16"):
        section = top.section(key)
        enabled = section.raw("enabled", AUTO) if section else AUTO
        if section and enabled != AUTO and enabled is not (precision is Precision.BF16):
            raise section.error("enabled", f'The YAML says {precision}. Write "auto" here.')
    low_states = ("bf16_master_weights_and_grads", "bf16_optimizer_states")
    for bf16 in filter(None, (top.section("bf16"), top.section("bfloat16"))):
        for key in low_states:
            if _is_on(bf16.raw(key)):
                raise bf16.error(
                    key, "Master weights and optimizer states are fp32 here: remove it."
                )
    types = top.section("data_types")
    if types and types.raw("grad_accum_dtype", "fp32") != "fp32":
        raise types.error("grad_accum_dtype", "Gradients are accumulated in fp32 here.")
    if top.raw("communication_data_type", "fp32") != "fp32":
        raise top.error("communication_data_type", "Gradients are reduced in fp32 here.")


def _clipping(top: Section, contract: BatchContract) -> float | None:
    if top.raw("gradient_clipping", AUTO) == AUTO:
        return None
    clipping = top.number("gradient_clipping", 0.0)
    if contract.max_grad_norm is not None and clipping != contract.max_grad_norm:
        raise top.error("gradient_clipping", f"The YAML says max_grad_norm: "
                        f'{contract.max_grad_norm:g}. Write "auto" here.')  # fmt: skip
    return clipping


def _is_on(value: object) -> bool:
    if isinstance(value, Mapping):
        return value.get("enabled", True) is not False
    return bool(value) and value != AUTO
