"""After prepare: is what runs what was asked for?

Several paths degrade without a word (FSDP2 on CPU becomes DDP, tensor parallelism is not applied,
a context-parallel plan runs without it). A trial that measured the wrong engine is worse than one
that failed, so every difference is an `InvalidRunError`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from autotune.plan import CpBackend, Engine, Plan, Recompute
from autotune.runner.compiling import count_compiled_layers, count_graphs, decoder_layers
from autotune.runner.placements import expected_groups, expected_placements
from autotune.runner.ring import BATCH_RING, VARLEN_LLAMA3
from autotune.runner.ring_package import load_ring_package
from autotune.runner.trainer import AutotuneTrainer, wrap_optimizer_step
from autotune.runner.training_checks import training_faults
from autotune.runner.ulysses import CONTEXT
from autotune.spec.model import model_from_config
from autotune.spec.workload import Precision, Workload
from autotune.trial.protocol import Request


class InvalidRunError(Exception):
    """What was asked for and what runs differ."""


def check_prepared(trainer: AutotuneTrainer, plan: Plan, workload: Workload) -> dict[str, Any]:
    """Check engine, stage, placements, wrapped layers and groups of the prepared model.

    Returns:
        What was found, for the record.

    Raises:
        InvalidRunError: naming what was asked for and what runs.
    """
    found: dict[str, Any] = {"engine": _engine_running(trainer)}
    _expect("engine", plan.engine.value, found["engine"])
    _expect("processes", plan.world_size, trainer.args.world_size)
    if plan.engine is Engine.DEEPSPEED:
        found |= _check_deepspeed(trainer.model_wrapped, plan, workload)
    elif plan.engine is Engine.FSDP2:
        found |= _check_fsdp2(trainer.model_wrapped, plan, workload)
    else:
        found |= _check_ddp(trainer.model_wrapped)
    found["groups"] = _check_groups(trainer.model_wrapped, plan, trainer.args.device)
    found["fp32_buffers"] = _check_buffers(trainer.model_wrapped, workload)
    return found


def check_attention(
    trainer: AutotuneTrainer, plan: Plan, request: Request, micro_steps: int
) -> dict[str, Any]:
    """Check, after the first step, that every layer went through the planned attention."""
    workload, model = request.workload, model_from_config(request.model.name, request.model.config)
    config = trainer.accelerator.unwrap_model(trainer.model_wrapped).config
    layers = config.num_hidden_layers
    passes = 2 if plan.recompute is Recompute.FULL else 1
    _expect("attention calls in a step", layers * passes * micro_steps, CONTEXT.calls)
    _expect("attention dtype", _compute_dtype(workload), CONTEXT.last_dtype)
    _batch, heads, tokens, _ = CONTEXT.last_shape
    ring = plan.cp > 1 and plan.cp_backend is CpBackend.RING
    _expect("ring attention calls in a step", CONTEXT.calls * ring, CONTEXT.ring_calls)
    if ring:
        own_heads = config.num_attention_heads // plan.tp
        return _check_ring(plan, workload, own_heads, trainer.args.device.type)
    _expect("attention heads a rank", config.num_attention_heads // (plan.cp * plan.tp), heads)
    _expect("tokens each attention sees", workload.seq_len, tokens)
    windowed = model.num_window_layers_at(workload.seq_len)
    masked = layers if workload.packing else windowed
    _expect("masked attention calls in a step", masked * passes * micro_steps, CONTEXT.masked_calls)
    kernel = "sdpa, block-diagonal mask" if workload.packing else "sdpa, causal"
    if windowed:
        kernel += f", window of {model.sliding_window} in {windowed} of {layers} layers"
    return {"attention": kernel, "attention_shape": list(CONTEXT.last_shape)}


def _check_ring(plan: Plan, workload: Workload, all_heads: int, device: str) -> dict[str, Any]:
    """Check that every rank kept all heads of its own tokens, and documents apart."""
    _batch, heads, tokens, _ = CONTEXT.last_shape
    _expect("attention heads a rank", all_heads, heads)
    _expect("queries of a rank", workload.seq_len // plan.cp, tokens)
    _expect("ranks of the ring", plan.cp, dist.get_world_size(CONTEXT.group))
    _expect("key-value heads gathered at a time", plan.heads_k_stride, CONTEXT.heads_k_stride)
    kept_apart = CONTEXT.calls if workload.packing else 0
    _expect("attention calls that keep documents apart", kept_apart, CONTEXT.document_calls)
    _expect("masked attention calls in a step", 0, CONTEXT.masked_calls)
    package = load_ring_package(device)
    way = VARLEN_LLAMA3 if workload.packing else BATCH_RING
    return {
        "attention": f"ring, {way}, {package.kernels}",
        "attention_shape": list(CONTEXT.last_shape),
    }


def check_compiled(trainer: AutotuneTrainer, graphs: int) -> dict[str, Any]:
    """Check, after the first step, that every decoder layer is compiled and the step made graphs.

    Args:
        trainer: holds the prepared model.
        graphs: how many were compiled in the step; those of an evaluation before it do not count.
    """
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    layers = count_compiled_layers(model)
    _expect("compiled decoder layers", _text_config(model).num_hidden_layers, layers)
    if not graphs:
        raise InvalidRunError("asked for torch.compile, but the first step compiled no graph")
    return {"compiled_layers": layers, "compiled_graphs": graphs}


class CheckCallback(TrainerCallback):
    """Runs the checks at their moments: after prepare, and after the first step."""

    def __init__(
        self, trainer: AutotuneTrainer, request: Request, found: Callable[[dict[str, Any]], None]
    ) -> None:
        self._trainer = trainer
        self._request = request
        self._found = found
        self._compiles = request.train is not None and request.train.torch_compile
        self._graphs_before = 0
        self._attention_checked = False

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Check the prepared model before the first step."""
        plan, workload = self._trainer.plan, self._request.workload
        self._found(check_prepared(self._trainer, plan, workload))
        found, fault = training_faults(self._trainer, self._request)
        if fault:
            raise InvalidRunError(fault)
        self._found(found)
        wrap_optimizer_step(self._trainer)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Count the first step's attention calls and compiled graphs from zero."""
        if not self._attention_checked:
            CONTEXT.count_from_zero()
            self._graphs_before = count_graphs() if self._compiles else 0

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Check the attention path of the first step, and that it was compiled."""
        if not self._attention_checked:
            self._attention_checked = True
            micro_steps = self._trainer.args.gradient_accumulation_steps
            plan, request = self._trainer.plan, self._request
            self._found(check_attention(self._trainer, plan, request, micro_steps))
            if self._compiles:
                graphs = count_graphs() - self._graphs_before
                self._found(check_compiled(self._trainer, graphs))


def _engine_running(trainer: AutotuneTrainer) -> str:
    model = trainer.model_wrapped
    if type(model).__name__ == "DeepSpeedEngine":
        return Engine.DEEPSPEED.value
    if isinstance(model, FSDPModule):
        return Engine.FSDP2.value
    if isinstance(model, DistributedDataParallel):
        return Engine.DDP.value
    return f"plain {type(model).__name__} ({trainer.accelerator.distributed_type})"


def _check_deepspeed(engine: Any, plan: Plan, workload: Workload) -> dict[str, Any]:
    zero = engine._config.zero_config
    _expect("ZeRO stage", plan.zero_stage, engine.zero_optimization_stage())
    _expect("ranks of a second copy", plan.hpz, max(1, engine.zero_hpz_partition_size()))
    offloaded = zero.offload_optimizer is not None and str(zero.offload_optimizer.device) != "none"
    _expect(
        "optimizer offload",
        plan.offload_optimizer,
        "cpu" in str(offloaded and zero.offload_optimizer.device),
    )
    in_host = zero.offload_param is not None and "cpu" in str(zero.offload_param.device)
    _expect("parameter offload", plan.offload_params, in_host)
    _expect("data-parallel ranks", plan.world_size, dist.get_world_size(engine.data_parallel_group))
    compute = _compute_dtype(workload)
    trainable = [p for p in engine.module.parameters() if p.requires_grad]
    _expect("parameter dtype", {compute}, {p.dtype for p in trainable})
    _expect("gradient reduction dtype", torch.float32, engine.communication_data_type)
    masters = _deepspeed_masters(engine.optimizer)
    _expect("master weight dtype", {torch.float32}, {m.dtype for m in masters})
    total = sum(_full_size(p) for p in trainable)
    held = sum(m.numel() for m in masters)
    # Flat partitions are padded to a multiple of the ranks (and of 2 for alignment).
    _expect_near("master elements a rank", total / plan.shard_size, held, total * 0.02 + 4096)
    if plan.zero_stage == 3:
        sharded = sum(hasattr(p, "ds_id") for p in engine.module.parameters())
        _expect("ZeRO-3 parameters", sum(1 for _ in engine.module.parameters()), sharded)
    return {"zero_stage": plan.zero_stage, "master_elements": held}


def _deepspeed_masters(optimizer: Any) -> list[torch.Tensor]:
    for name in (
        "single_partition_of_fp32_groups",  # ZeRO-1 and 2
        "fp32_partitioned_groups_flat",  # ZeRO-3
        "fp32_groups_flat_partition",  # BF16_Optimizer
    ):
        masters = getattr(optimizer, name, None)
        if masters:
            return list(masters)
    raise InvalidRunError(f"asked for ZeRO, but {type(optimizer).__name__} holds no master shards")


def _check_fsdp2(model: torch.nn.Module, plan: Plan, workload: Workload) -> dict[str, Any]:
    units = [m for m in model.modules() if isinstance(m, FSDPModule)]
    num_layers = _text_config(model).num_hidden_layers
    layers = decoder_layers(model)
    _expect("decoder layers", num_layers, len(layers))
    _expect("layers left unwrapped", 0, sum(not isinstance(m, FSDPModule) for m in layers))
    recomputed = num_layers if plan.recompute is Recompute.FULL else 0
    _expect(
        "recomputed layers",
        recomputed,
        sum(type(m).__name__.endswith("CheckpointWrapper") for m in model.modules()),
    )
    placements: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            raise InvalidRunError(f"asked for FSDP2, but {name} is not a DTensor")
        expected = expected_placements(name, plan)
        _expect(f"placements of {name}", expected, tuple(parameter.placements))
        sizes = [plan.dp_replicate] * (plan.dp_replicate > 1) + [plan.shard_size]
        sizes += [plan.tp] * (plan.tp > 1)
        _expect(f"mesh of {name}", sizes, list(parameter.device_mesh.shape))
        if parameter.requires_grad:
            _expect(f"master dtype of {name}", torch.float32, parameter.dtype)
        if plan.offload_params:
            _expect(f"device of {name}", "cpu", parameter.to_local().device.type)
        placements[str(tuple(parameter.placements))] += 1
    policy = model._get_fsdp_state()._mp_policy
    if workload.precision is Precision.BF16:
        _expect("compute dtype", torch.bfloat16, policy.param_dtype)
        _expect("gradient reduction dtype", torch.float32, policy.reduce_dtype)
    reshard = {
        bool(m._get_fsdp_state()._fsdp_param_group.post_forward_mesh_info)
        for m in layers
        if m._get_fsdp_state()._fsdp_param_group is not None
    }
    if plan.shard_size > 1:
        _expect("reshard after forward", {plan.reshard_after_forward}, reshard)
    if plan.tp > 1 and _text_config(model).tie_word_embeddings:
        pair = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        _expect("output head that is the embedding", True, pair[0] is pair[1])
    return {"placements": dict(placements), "fsdp_units": len(units)}


def _compute_dtype(workload: Workload) -> torch.dtype:
    return torch.bfloat16 if workload.precision is Precision.BF16 else torch.float32


def _text_config(model: Any) -> Any:
    return model.config.get_text_config()


def _check_ddp(model: torch.nn.Module) -> dict[str, Any]:
    trainable = [p for p in model.parameters() if p.requires_grad]
    _expect("master weight dtype", {torch.float32}, {p.dtype for p in trainable})
    return {"placements": {"replicated": len(trainable)}}


def _check_groups(model: Any, plan: Plan, device: torch.device) -> dict[str, int]:
    """Run one real collective in each group and compare who answers with who belongs to it."""
    rank = dist.get_rank()
    members = expected_groups(plan, rank)
    groups: dict[str, tuple[dist.ProcessGroup | None, list[int]]] = {
        "world": (None, members["world"])
    }
    if plan.cp > 1:
        groups["sequence"] = (CONTEXT.group, members["sequence"])
    if plan.engine is Engine.DEEPSPEED:
        groups["data-parallel"] = (model.data_parallel_group, members["world"])
    elif plan.engine is Engine.FSDP2:
        mesh, shard = next(model.parameters()).device_mesh, int(plan.dp_replicate > 1)
        groups["shard"] = (mesh.get_group(shard), members["shard"])
        if plan.dp_replicate > 1:
            groups["replicate"] = (mesh.get_group(0), members["replicate"])
        if plan.tp > 1:
            groups["tensor-parallel"] = (mesh.get_group(shard + 1), members["tensor-parallel"])
    else:
        groups["replicate"] = (model.process_group, members["world"])
    own = torch.tensor([rank], device=device)
    for name, (group, asked) in groups.items():
        answers = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(answers, own, group=group)
        found = [int(answer) for answer in answers]
        _expect(f"ranks answering in the {name} group", asked, found)
    return {name: len(asked) for name, (_, asked) in groups.items()}


def _check_buffers(model: torch.nn.Module, workload: Workload) -> int:
    """Rotary frequencies in bf16 misplace far tokens; no engine may cast them.

    Returns:
        How many buffers are in fp32.
    """
    kept = 0
    for place, module in model.named_modules():
        for name, buffer in module.named_buffers(place, recurse=False):
            if not buffer.is_floating_point():
                continue
            if hasattr(module, "scalar_embed_scale"):
                _check_scale(name, buffer, module.scalar_embed_scale, _compute_dtype(workload))
            else:
                _expect(f"dtype of buffer {name}", torch.float32, buffer.dtype)
            kept += buffer.dtype is torch.float32
    return kept


def _check_scale(name: str, buffer: torch.Tensor, scale: float, compute: torch.dtype) -> None:
    """Check the factor of a scaled embedding (Gemma), which ZeRO-3 builds in the compute type.

    transformers casts it to the weight's type before its one use (``embed_scale.to(weight.dtype)``
    in ``modeling_gemma3.py``), which is the compute type under every engine but DDP. So that
    engine's own number is right in either type, and nothing else is.
    """
    if buffer.dtype is not torch.float32:
        _expect(f"dtype of buffer {name}", compute, buffer.dtype)
    used = torch.tensor(scale).to(compute)
    _expect(f"value of buffer {name}", float(used), float(buffer.to(compute)))


def _full_size(parameter: Any) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _expect(what: str, asked: Any, runs: Any) -> None:
    if asked != runs:
        raise InvalidRunError(f"{what}: asked for {_text(asked)}, but {_text(runs)} runs")


def _expect_near(what: str, asked: float, runs: float, slack: float) -> None:
    if abs(asked - runs) > slack:
        raise InvalidRunError(f"{what}: asked for about {asked:.0f}, but {runs:.0f} runs")


def _text(value: Any) -> str:
    if isinstance(value, set):
        return " and ".join(sorted(map(str, value))) or "nothing"
    return str(value)
