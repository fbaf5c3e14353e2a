"""A plan as an Axolotl configuration: `best.yml`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from autotune.config.block import AutotuneBlock
from autotune.config.kernels import with_kept
from autotune.emit.axolotl_keys import (
    comment,
    data_keys,
    ring_keys,
    schedule_keys,
    workload_keys,
    yaml_text,
)
from autotune.emit.deepspeed import portable_deepspeed_config
from autotune.plan import CpBackend, Engine, Plan, Recompute
from autotune.spec.catalogue import read_catalogue
from autotune.spec.model import ModelSpec
from autotune.spec.training import DatasetSource, TrainSettings
from autotune.spec.workload import Workload


def emit_axolotl(
    model: ModelSpec,
    workload: Workload,
    plan: Plan,
    *,
    train: TrainSettings | None = None,
    datasets: Sequence[DatasetSource] = (),
    test_datasets: Sequence[DatasetSource] = (),
    output_dir: str = "./model-out",
    seed: int = 42,
    device: Literal["cuda", "cpu"] = "cuda",
    autotune: AutotuneBlock | None = None,
    file_name: str = "best.yml",
    base_model: str | None = None,
    extra: Mapping[str, Any] | None = None,
) -> str:
    """Return the YAML text of a configuration that trains `plan`.

    `autotune.config.load_config` reads it back to an equal plan. Without datasets there is no
    `datasets` key, so Axolotl refuses the file until one is added; `autotune train` takes `--data`.

    Args:
        model: The model.
        workload: The contract the plan was measured under.
        plan: What to write.
        train: Schedule, logging and saving; its defaults when None.
        datasets: Entries of `datasets:`.
        test_datasets: Entries of `test_datasets:`.
        output_dir: Where the run writes.
        seed: Of data order and initial weights.
        device: Decides whether offloaded states are pinned in host memory.
        autotune: The block of our own.
        file_name: Named in the header's command.
        base_model: As the file says it; None takes the model's own.
        extra: Further keys, as they are.
    """
    train = train or TrainSettings()
    keys: dict[str, Any] = {"base_model": base_model or base_model_of(model)}
    keys |= data_keys(datasets, test_datasets, train)
    keys |= workload_keys(workload)
    keys |= {
        "micro_batch_size": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.grad_accum_steps,
        "gradient_checkpointing": plan.recompute is Recompute.FULL,
    }
    keys |= _engine(plan, model, workload, device)
    keys |= _mesh(plan) | ring_keys(plan, packed=workload.packing)
    keys |= schedule_keys(train)
    keys |= {"output_dir": output_dir, "seed": seed}
    keys = with_kept(keys, extra or {})
    if autotune is not None:
        keys["autotune"] = autotune.model_dump(mode="json", exclude_defaults=True)
    return _header(model, plan, autotune, file_name) + yaml_text(keys)


def base_model_of(model: ModelSpec) -> str:
    """Return what `base_model` should say: the local files, the Hub id, or the name."""
    if given := model.local_path or model.weights:
        return given
    entry = read_catalogue("models").get(model.name, {})
    return str(entry.get("hub", model.name))


def decoder_layer_class(model: ModelSpec) -> str | None:
    """Return the class FSDP2 wraps, such as ``Qwen3DecoderLayer``; None when unknown.

    The families read here all name it after their causal-LM class.
    """
    for architecture in model.hf_config.get("architectures") or []:
        if architecture.endswith("ForCausalLM"):
            return f"{architecture.removesuffix('ForCausalLM')}DecoderLayer"
    return None


def _engine(
    plan: Plan, model: ModelSpec, workload: Workload, device: Literal["cuda", "cpu"]
) -> dict[str, Any]:
    if plan.engine is Engine.DEEPSPEED:
        return {"deepspeed": portable_deepspeed_config(plan, model, workload, device=device)}
    if plan.engine is Engine.DDP:
        return {}
    layer = decoder_layer_class(model)
    return {
        "fsdp_version": 2,
        "fsdp_config": {
            "reshard_after_forward": plan.reshard_after_forward,
            "offload_params": plan.offload_params,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            **({"transformer_layer_cls_to_wrap": layer} if layer else {}),
            "state_dict_type": "SHARDED_STATE_DICT",
            # Axolotl would quantise on rank 0 alone and wait for the others for ever.
            "cpu_ram_efficient_loading": not (workload.adapter and workload.adapter.base_storage),
        },
    }


def _mesh(plan: Plan) -> dict[str, Any]:
    """Return the mesh keys.

    They are explicit wherever Axolotl would not fill them to the number of ranks: its own filling
    reaches Accelerate only for sizes that were set.
    """
    keys: dict[str, Any] = {}
    hybrid = plan.engine is Engine.FSDP2 and plan.dp_replicate > 1
    if plan.cp > 1:
        # Axolotl's context parallelism takes FlashAttention 2 alone.
        keys |= {"context_parallel_size": plan.cp, "attn_implementation": "flash_attention_2"}
    if plan.tp > 1:
        keys["tensor_parallel_size"] = plan.tp
    if hybrid or plan.tp > 1 or (plan.cp > 1 and plan.engine is not Engine.DEEPSPEED):
        # With DeepSpeed Axolotl refuses dp_shard_size at the start, and fills it rightly itself.
        keys |= {"dp_shard_size": plan.dp_shard, "dp_replicate_size": plan.dp_replicate}
    return keys


def _header(model: ModelSpec, plan: Plan, autotune: AutotuneBlock | None, file_name: str) -> str:
    measured = autotune.measured.get("tokens_per_s") if autotune else None
    figure = f": {measured:,.0f} tokens/s measured" if measured else ""
    lines = [
        f"{model.name} on {plan.world_size} ranks, {plan.describe()}{figure}.",
        f"Train: autotune train {file_name}",
        "An Axolotl configuration; Axolotl ignores the block `autotune` at the end.",
    ]
    if plan.cp > 1 and plan.cp_backend is CpBackend.RING:
        lines.append(
            "Axolotl's context parallelism takes micro_batch_size 1 alone with sample_packing."
        )
    elif plan.cp > 1:
        lines.append(
            f"context_parallel_size {plan.cp} runs as Ulysses sequence parallelism here; Axolotl "
            "runs ring attention and, with sample_packing, takes micro_batch_size 1 alone."
        )
    return comment(lines)
