"""A job as an Axolotl configuration that Axolotl itself runs."""

from __future__ import annotations

from dataclasses import replace

from autotune.emit.axolotl import emit_axolotl
from autotune.emit.axolotl_keys import data_settings_keys
from autotune.emit.job import Exported, Job, fsdp2_reduction, starts_one_host
from autotune.errors import AutotuneError
from autotune.plan import CpBackend, Engine


def to_axolotl(job: Job, file_name: str) -> Exported:
    """Return the YAML.

    Axolotl's context parallelism takes packed sequences one at a time: there the micro batch
    becomes accumulation, at the same global batch, and a warning says so.

    Raises:
        AutotuneError: sequence parallelism under DDP, which Axolotl does not run.
    """
    plan, warnings, lost = job.plan, [], []
    if plan.cp > 1:
        if plan.engine is Engine.DDP and plan.data_parallel_size > 1:
            raise AutotuneError(
                f"context_parallel_size {plan.cp} under DDP: Axolotl builds its mesh with "
                "accelerate, which refuses it. Use an FSDP2 or DeepSpeed plan."
            )
        if plan.cp_backend is CpBackend.ULYSSES:
            warnings.append(
                f"context_parallel_size: {plan.cp} is ring attention in Axolotl "
                "(attn_implementation: flash_attention_2), measured here was Ulysses: memory and "
                "speed differ."
            )
        if job.workload.packing and plan.micro_batch_size > 1:
            steps = plan.grad_accum_steps * plan.micro_batch_size
            warnings.append(
                f"micro_batch_size: {plan.micro_batch_size} is written as 1 and "
                f"gradient_accumulation_steps as {steps}: with sample_packing Axolotl's context "
                "parallelism takes micro_batch_size 1 alone. The global batch is the same."
            )
            lost = ["micro_batch_size", "grad_accum_steps"]
            plan = replace(plan, micro_batch_size=1, grad_accum_steps=steps)
    warnings += fsdp2_reduction(job)
    warnings += starts_one_host(
        plan, "add --num_machines, --machine_rank and --main_process_ip on each"
    )
    if not job.datasets:
        warnings.append("datasets is missing: Axolotl refuses the file until it has one.")
    extra = data_settings_keys(job.data) | dict(job.passthrough)
    if job.tokenizer is not None:
        extra["tokenizer_config"] = job.tokenizer
    if plan.cp > 1:
        extra.pop("attn_implementation", None)  # the one Axolotl's ring needs is written
    text = emit_axolotl(
        job.model,
        job.workload,
        plan,
        train=job.train,
        datasets=job.datasets,
        test_datasets=job.test_datasets,
        output_dir=job.output_dir,
        seed=job.seed,
        device=job.device,
        base_model=job.base_model,
        extra=extra,
        file_name=file_name,
    )
    return Exported(
        files={file_name: text},
        command=f"axolotl train {file_name} -- --num_processes {plan.world_size}",
        warnings=tuple(warnings),
        lost=tuple(lost),
    )
