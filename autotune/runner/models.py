"""Build the model: random weights from a config, or pretrained weights loaded sharded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.integrations import deepspeed as hf_deepspeed
from transformers.integrations import is_deepspeed_zero3_enabled

from autotune.errors import AutotuneError
from autotune.plan import Engine, Plan
from autotune.runner.experts import EXPERTS_NAME, register_experts
from autotune.runner.quantised import (
    keep_one_packing,
    quantisation_config,
    quantise_linears,
)
from autotune.runner.ulysses import ATTENTION_NAME, register_attention
from autotune.spec.workload import BaseStorage, Lora, Precision
from autotune.trial.protocol import Request


def build_model(request: Request, plan: Plan) -> PreTrainedModel:
    """Build the model of a request on this rank.

    Weights are fp32 (the master weights); in bf16 runs random weights are rounded to bf16 first, as
    DeepSpeed takes its master copy from bf16 weights: so every engine starts from the same state.
    Host memory: ZeRO-3 shards while building. FSDP2 fills one copy on rank 0 and broadcasts it; the
    other ranks hold untouched pages. DDP, ZeRO-1/2 and tensor parallelism hold a full copy a rank.

    Raises:
        AutotuneError: pretrained weights lack a parameter or bring one too many.
    """
    register_attention()
    register_experts()
    workload = request.workload
    if workload.adapter is not None and workload.adapter.base_storage is not None:
        # ZeRO-3 would shard each weight before it is quantised.
        with _zero3_set_aside():
            model = _build_quantised(request, workload.adapter.base_storage)
        keep_one_packing(model)
    elif request.model.weights:
        model = _load_pretrained(request.model.weights)
    else:
        model = _allocate(request.model.config)
        whole = plan.engine is not Engine.FSDP2 or plan.tp > 1 or workload.fp8_all_gather
        if whole or _is_first_rank():
            _initialise(model, request.seed, workload.precision)
    model.config.use_cache = False
    if workload.adapter is not None:
        torch.manual_seed(request.seed)
        model = add_adapter(model, workload.adapter)
        if plan.engine is not Engine.DEEPSPEED:
            _keep_masters(model)
    return model


def _keep_masters(model: torch.nn.Module) -> None:
    """Hold trained weights in fp32, as everywhere: PEFT takes the type 4-bit weights are stored in.

    DeepSpeed must have them in the compute type (ZeRO-3 would compute in fp32) and keeps masters.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype is not torch.float32:
            parameter.data = parameter.data.float()


def _build_quantised(request: Request, storage: BaseStorage) -> PreTrainedModel:
    """Build the model with its projections in 4 bits, whole on every rank."""
    config = quantisation_config(storage, request.workload.precision)
    device = torch.device(request.device)
    if request.device == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    if request.model.weights:
        model, report = _from_pretrained(
            request.model.weights, quantization_config=config, device_map={"": device}
        )
        _check_weights(request.model.weights, report)
        return model
    model = _allocate(request.model.config)
    _initialise(model, request.seed, request.workload.precision)
    return quantise_linears(model, config, device)


def _allocate(config: dict[str, Any]) -> PreTrainedModel:
    """Build the model without writing its weights: the kernel gives no pages until they are."""
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**config),
            dtype=torch.float32,
            attn_implementation=ATTENTION_NAME,
            experts_implementation=EXPERTS_NAME,
        )
    model.tie_weights()  # part of the initialisation that was left out
    return model


def _load_pretrained(folder: str) -> PreTrainedModel:
    if is_deepspeed_zero3_enabled():
        # There transformers reports no unexpected key, whatever the files hold: look without it.
        with _zero3_set_aside():
            _check_weights(folder, _from_pretrained(folder, device_map="meta")[1])
    model, report = _from_pretrained(folder)
    _check_weights(folder, report)
    return model


def _from_pretrained(folder: str, **more: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    try:
        loaded: tuple[PreTrainedModel, dict[str, Any]] = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation=ATTENTION_NAME,
            experts_implementation=EXPERTS_NAME,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported, and fatal: see _check_weights
            local_files_only=Path(folder).is_dir(),
            **more,
        )
    except OSError as error:
        if error.errno is not None:  # the system's: out of memory, a failing disk
            raise
        # transformers' own, without a number: the files are not there.
        raise AutotuneError(
            f"The weights of {folder} cannot be read: {' '.join(str(error).splitlines()[:1])} Give "
            "base_model a local folder that holds them, or a Hub id that can be reached."
        ) from error
    return loaded


def _check_weights(folder: str, report: dict[str, Any]) -> None:
    wrong = {
        what: sorted(map(str, report[what]))
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if report.get(what)
    }
    if wrong:
        listed = "; ".join(
            f"{what.replace('_', ' ')}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
            for what, names in wrong.items()
        )
        raise AutotuneError(
            f"The weights in {folder} do not match the model ({listed}). "
            "Training would start from random values there. Check base_model and its files."
        )


@contextlib.contextmanager
def _zero3_set_aside() -> Iterator[None]:
    """Let transformers build a model as if ZeRO-3 were not asked for."""
    kept = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = kept


def _initialise(model: PreTrainedModel, seed: int, precision: Precision) -> None:
    """Draw the initial weights, the same on every engine, module by module.

    transformers skips this under ZeRO-3 (the parameters are in shards while the model is built),
    which would leave another initial state for that one strategy.
    """
    torch.manual_seed(seed)
    tied = model.config.tie_word_embeddings
    output = model.get_output_embeddings()
    for module in model.modules():
        if not module._parameters or (tied and module is output):
            continue
        real = {name: p for name, p in module._parameters.items() if p is not None}
        with _gathered(list(real.values())):
            # Drawn in fp32 on the CPU, whatever the engine made of dtype and device: other random
            # numbers would come out elsewhere.
            for name, parameter in real.items():
                drawn = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
                module._parameters[name] = torch.nn.Parameter(drawn)
            model._init_weights(module)
            for name, parameter in real.items():
                values = module._parameters[name]
                if precision is Precision.BF16:
                    values = values.to(torch.bfloat16)
                parameter.data.copy_(values)
                module._parameters[name] = parameter


@contextlib.contextmanager
def _gathered(parameters: list[torch.nn.Parameter]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if is_deepspeed_zero3_enabled():
            import deepspeed

            stack.enter_context(deepspeed.zero.GatheredParameters(parameters, modifier_rank=0))
        yield


def add_adapter(model: PreTrainedModel, adapter: Lora) -> Any:
    """Wrap a model in a low-rank adapter; what is traced and what is trained get the same."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        model,
        LoraConfig(
            r=adapter.r,
            lora_alpha=adapter.alpha,
            lora_dropout=adapter.dropout,
            target_modules=list(adapter.target_modules),
            task_type="CAUSAL_LM",
            use_rslora=adapter.rslora,
            use_dora=adapter.dora,
        ),
        # The engine decides: otherwise ZeRO-3 alone would compute its adapters in fp32.
        autocast_adapter_dtype=False,
    )


def _is_first_rank() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0
