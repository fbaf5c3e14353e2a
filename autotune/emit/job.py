"""`Job`: what an export writes down, and `Exported`: what comes of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from autotune.config.run import RunConfig
from autotune.emit.axolotl import base_model_of
from autotune.emit.axolotl_keys import data_settings_keys, schedule_keys, workload_keys
from autotune.plan import CpBackend, Engine, Plan, Recompute
from autotune.spec.model import ModelSpec, load_model
from autotune.spec.training import DatasetSource, DataSettings, TrainSettings
from autotune.spec.workload import Precision, Workload

Device = Literal["cuda", "cpu"]

RANKS_A_NODE = 8
"""As many as hosts usually have; a plan names ranks, not hosts."""

# Plan fields by the key of a configuration that says them: warnings name the key.
PLAN_KEYS: Mapping[str, str] = {
    "micro_batch_size": "micro_batch_size",
    "grad_accum_steps": "gradient_accumulation_steps",
    "recompute": "gradient_checkpointing",
    "tp": "tensor_parallel_size",
    "cp": "context_parallel_size",
    "cp_backend": "ring_attn_func",
    "heads_k_stride": "heads_k_stride",
    "dp_replicate": "dp_replicate_size",
    "dp_shard": "dp_shard_size",
    "bucket_elements": "deepspeed.zero_optimization.reduce_bucket_size",
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A plan with all that a configuration says beside it."""

    base_model: str
    model: ModelSpec
    workload: Workload
    """With the global batch of `plan`."""
    plan: Plan
    train: TrainSettings = field(default_factory=TrainSettings)
    datasets: tuple[DatasetSource, ...] = ()
    test_datasets: tuple[DatasetSource, ...] = ()
    data: DataSettings = field(default_factory=DataSettings)
    output_dir: str = "./model-out"
    seed: int = 42
    device: Device = "cuda"
    tokenizer: str | None = None
    """Where it is not the model's own."""
    passthrough: Mapping[str, Any] = field(default_factory=dict)
    """Axolotl keys that are not used here."""

    def with_plan(self, plan: Plan) -> Job:
        """Return the same job with another plan."""
        return replace(self, plan=plan)


def job_of(config: RunConfig, num_gpus: int, device: Device) -> Job:
    """Return what a configuration says, laid out on `num_gpus` ranks.

    Raises:
        AutotuneError: its parallel sizes do not multiply to `num_gpus`.
    """
    own = load_model(config.base_model).tokenizer
    return Job(
        base_model=base_model_of(config.model),
        model=config.model,
        workload=config.workload_on(num_gpus),
        plan=config.plan(num_gpus),
        train=config.train,
        datasets=config.datasets,
        test_datasets=config.test_datasets,
        data=config.data,
        output_dir=config.output_dir,
        seed=config.seed,
        device=device,
        tokenizer=config.model.tokenizer if config.model.tokenizer != own else None,
        passthrough=config.passthrough,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """A plan in another tool's words."""

    files: Mapping[str, str]
    """Text by file name, the main file first; the others lie beside it."""
    command: str
    """What runs it; SCRIPT stands for a training script of one's own."""
    warnings: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    """Fields of the plan that the files do not say; a warning names the key of each."""


def cp_words(plan: Plan) -> str:
    """Return what splits a plan's sequences, as words of a sentence."""
    if plan.cp_backend is CpBackend.ULYSSES:
        return "Ulysses"
    stride = plan.heads_k_stride
    return f"ring attention{f' with heads_k_stride: {stride}' if stride > 1 else ''}"


def fsdp2_reduction(job: Job) -> list[str]:
    """Return the warning that accelerate's FSDP2 sums gradients in bf16; or none.

    Its `set_mixed_precision` takes one type for parameters, reduction and output, and no key of a
    file says another.
    """
    if job.plan.engine is not Engine.FSDP2 or job.workload.precision is not Precision.BF16:
        return []
    return [
        "bf16: accelerate's FSDP2 reduces gradients and returns the loss in bf16, measured here "
        "was fp32: numbers, memory and speed differ."
    ]


def starts_one_host(plan: Plan, how: str) -> list[str]:
    """Return the warning that the command starts more ranks than a host has; or none."""
    if plan.world_size <= RANKS_A_NODE:
        return []
    return [f"The command starts all {plan.world_size} ranks on one host: for several, {how}."]


def cannot_say(tool: str, keys: Mapping[str, Any], advice: str) -> list[str]:
    """Return the warning that names keys without a word in the tool, with their values; or none."""
    if not keys:
        return []
    said = ", ".join(f"{key}: {_text(value)}" for key, value in keys.items())
    return [f"{tool} cannot say {said}. {advice}"]


def lost_plan_keys(plan: Plan, fields: tuple[str, ...]) -> dict[str, Any]:
    """Return the keys, with values, of those `fields` of the plan that are not at their default."""
    values = {name: getattr(plan, name) for name in fields}
    default = Plan(strategy=plan.strategy, engine=plan.engine)
    return {
        PLAN_KEYS[name]: value is Recompute.FULL if isinstance(value, Recompute) else value
        for name, value in values.items()
        if value != getattr(default, name)
    }


def lost_fields(plan: Plan, fields: tuple[str, ...]) -> tuple[str, ...]:
    """Return those `fields` that are not at their default, hence really lost."""
    default = Plan(strategy=plan.strategy, engine=plan.engine)
    return tuple(name for name in fields if getattr(plan, name) != getattr(default, name))


def training_keys(job: Job, said: Iterable[str] = ()) -> dict[str, Any]:
    """Return what is trained, as Axolotl keys: what a target that lays out ranks cannot say.

    Everything that `best.yml` would say beside the plan, so that no setting is dropped in silence;
    of the schedule, the data and the seed only what is not at its default.

    Args:
        job: What is exported.
        said: Keys that the target has a word for.
    """
    train, workload = job.train, job.workload
    keys: dict[str, Any] = {"base_model": job.base_model}
    keys |= {key: value for key, value in workload_keys(workload).items() if key != "bf16"}
    schedule, default = schedule_keys(train), schedule_keys(TrainSettings())
    keys |= {key: value for key, value in schedule.items()
             if key == "learning_rate" or value != default.get(key)}  # fmt: skip
    if job.seed != Job.seed:
        keys["seed"] = job.seed
    keys |= data_settings_keys(job.data)
    held_out = {"val_set_size": train.val_set_size, "datasets": len(job.datasets),
                "test_datasets": len(job.test_datasets)}  # fmt: skip
    keys |= {key: value for key, value in held_out.items() if value}
    return {key: value for key, value in keys.items() if key not in set(said)}


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{len(value)} entries" if isinstance(value, list | tuple) else str(value)
