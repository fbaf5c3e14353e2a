"""Which plans are legal: one small function a rule, each with a stable code (docs/rules.md)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from autotune.plan import CpBackend, Engine, Plan, Recompute
from autotune.spec.hardware import HardwareSpec
from autotune.spec.model import ModelSpec
from autotune.spec.strategy import Strategy
from autotune.spec.workload import Precision, Workload
from autotune.tensor_rules import tensor_parallel_splits
from autotune.training_rules import TRAINING_RULES


@dataclass(frozen=True, kw_only=True, slots=True)
class Violation:
    """A rule a plan breaks."""

    code: str
    message: str
    """What was given and what is allowed."""
    hint: str
    """What to do."""

    def __str__(self) -> str:
        return f"{self.code}: {self.message} {self.hint}"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Case:
    plan: Plan
    model: ModelSpec
    workload: Workload
    hardware: HardwareSpec


def check_plan(
    plan: Plan, model: ModelSpec, workload: Workload, hardware: HardwareSpec
) -> list[Violation]:
    """Return every rule the plan breaks; an empty list means it may run."""
    case = _Case(plan=plan, model=model, workload=workload, hardware=hardware)
    found = [(code, rule(case)) for code, rule in RULES.items()]
    found += [
        (code, rule(plan, model, workload, hardware)) for code, rule in TRAINING_RULES.items()
    ]
    return [
        Violation(code=code, message=broken[0], hint=broken[1]) for code, broken in found if broken
    ]


def check_strategy(strategy: Strategy, workload: Workload, cp: int) -> list[Violation]:
    """Return what a strategy's own file says it does not support."""
    found = []
    if cp > 1 and not strategy.supports_sequence_parallel:
        found.append(
            Violation(
                code="AT116",
                message=f"Strategy {strategy.name} does not support sequence parallelism.",
                hint="Use cp=1 or another strategy.",
            )
        )
    if workload.adapter is not None and not strategy.supports_lora:
        found.append(
            Violation(
                code="AT117",
                message=f"Strategy {strategy.name} does not support LoRA.",
                hint="Train all parameters or use another strategy.",
            )
        )
    return found


def nearest_multiples(value: int, divisor: int) -> str:
    """Return the multiples of `divisor` around `value`, as words."""
    below = value - value % divisor
    return f"{below} or {below + divisor}" if below else str(divisor)


_Broken = tuple[str, str] | None
"""Message and hint, or None when the rule holds."""


def _cp_divides_ranks(case: _Case) -> _Broken:
    ranks, cp, tp = case.hardware.num_gpus, case.plan.cp, case.plan.tp
    if ranks % (cp * tp) == 0:
        return None
    legal = ", ".join(str(d) for d in range(1, ranks + 1) if ranks % d == 0)
    given = f"Sequence-parallel degree {cp}"
    if tp > 1:
        given = f"Tensor-parallel degree {tp}" + (f" x sequence-parallel degree {cp}") * (cp > 1)
    return (f"{given} does not divide {ranks} GPUs.", f"Degrees that do: {legal}.")


def _world_size(case: _Case) -> _Broken:
    plan, ranks = case.plan, case.hardware.num_gpus
    if plan.world_size == ranks or ranks % (plan.cp * plan.tp):
        return None
    mesh = f"{plan.dp_replicate} x {plan.dp_shard} x {plan.cp} x {plan.tp}"
    return (
        f"The mesh dp_replicate x dp_shard x cp x tp = {mesh} makes {plan.world_size} ranks, "
        f"the hardware has {ranks}.",
        "Choose degrees whose product is the number of GPUs.",
    )


def _batch_divides(case: _Case) -> _Broken:
    batch, dp = case.workload.global_batch_size, case.plan.data_parallel_size
    if batch % dp == 0:
        return None
    return (
        f"A global batch of {batch} sequences does not divide over {dp} data-parallel ranks.",
        f"Nearest that do: {nearest_multiples(batch, dp)}.",
    )


def _batch_is_exact(case: _Case) -> _Broken:
    plan, batch = case.plan, case.workload.global_batch_size
    if plan.global_batch_size == batch or batch % plan.data_parallel_size:
        return None
    return (
        f"micro_batch_size {plan.micro_batch_size} x {plan.data_parallel_size} data-parallel ranks "
        f"x grad_accum_steps {plan.grad_accum_steps} = {plan.global_batch_size} sequences, the "
        f"global batch is {batch}.",
        f"micro_batch_size x grad_accum_steps must be {batch // plan.data_parallel_size}.",
    )


def heads_divide(model: ModelSpec, cp: int) -> bool:
    """Say whether Ulysses can split a model's heads over `cp` ranks."""
    return model.num_heads % cp == 0 and model.num_kv_heads % cp == 0


def _cp_divides_sequence(case: _Case) -> _Broken:
    length, cp = case.workload.seq_len, case.plan.cp
    if length % cp == 0:
        return None
    return (
        f"A sequence of {length} tokens does not divide over {cp} sequence-parallel ranks.",
        f"Nearest that do: {nearest_multiples(length, cp)}.",
    )


def _cp_divides_heads(case: _Case) -> _Broken:
    cp, tp = case.plan.cp, case.plan.tp
    if cp == 1 or case.plan.cp_backend is CpBackend.RING or heads_divide(case.model, cp * tp):
        return None
    heads, kv_heads = case.model.num_heads // tp, case.model.num_kv_heads // tp
    legal = ", ".join(
        str(d) for d in range(1, max(kv_heads, 1) + 1) if heads % d == 0 and kv_heads % d == 0
    )
    where = f" of each of {tp} tensor-parallel ranks" if tp > 1 else ""
    return (
        f"Ulysses sequence parallelism splits the heads: {heads} attention and {kv_heads} "
        f"key-value heads{where} do not divide by {cp}.",
        f"Degrees that do: {legal}." + " Ring attention takes any." * (tp == 1),  # see AT115
    )


def _hybrid_needs_both(case: _Case) -> _Broken:
    plan = case.plan
    if plan.engine is not Engine.FSDP2 or plan.dp_replicate == 1 or plan.dp_shard > 1:
        return None
    return (
        "Hybrid sharding needs at least 2 copies of at least 2 shards, so 4 data-parallel ranks; "
        f"this is dp_replicate {plan.dp_replicate}, dp_shard {plan.dp_shard}.",
        "Use fsdp2 or ddp on fewer ranks.",
    )


def _fsdp_shards(case: _Case) -> _Broken:
    plan = case.plan
    if plan.engine is not Engine.FSDP2 or plan.shard_size > 1 or plan.world_size == 1:
        return None
    return (
        f"FSDP2 with dp_shard x cp = 1 on {plan.world_size} ranks shards nothing.",
        "Use more ranks, or a tp below theirs." if plan.tp > 1 else "Use ddp, or dp_shard above 1.",
    )


def _zero_stage(case: _Case) -> _Broken:
    plan = case.plan
    if plan.engine is Engine.DEEPSPEED:
        if plan.zero_stage in (1, 2, 3):
            return None
        return (f"DeepSpeed has no ZeRO stage {plan.zero_stage} here.", "Use stage 1, 2 or 3.")
    if plan.zero_stage == 0:
        return None
    return (
        f"zero_stage {plan.zero_stage} belongs to DeepSpeed, the engine is {plan.engine}.",
        "Use zero_stage 0 or the engine deepspeed.",
    )


def _offload_fits_engine(case: _Case) -> _Broken:
    plan = case.plan
    if plan.engine is Engine.DEEPSPEED and plan.offload_params and plan.zero_stage != 3:
        return (
            f"DeepSpeed moves parameters to the host on ZeRO-3 alone, not on stage "
            f"{plan.zero_stage}.",
            "Use zero_stage 3 or offload_optimizer without offload_params.",
        )
    if plan.engine is Engine.FSDP2 and plan.offload_params != plan.offload_optimizer:
        return (
            "FSDP2 moves parameters, gradients and optimizer to the host together.",
            "Set offload_params and offload_optimizer alike.",
        )
    return None


def _ddp_replicates(case: _Case) -> _Broken:
    plan = case.plan
    if plan.engine is not Engine.DDP:
        return None
    if plan.dp_shard == 1 and not plan.offload_optimizer and not plan.offload_params:
        return None
    return (
        "DDP keeps all model states on every rank: it neither shards nor offloads.",
        "Use dp_shard 1 without offload, or another strategy.",
    )


def _deepspeed_shards_over_all(case: _Case) -> _Broken:
    plan = case.plan
    if plan.engine is not Engine.DEEPSPEED or plan.dp_replicate == 1:
        return None
    return (
        f"DeepSpeed shards over all data-parallel ranks; dp_replicate {plan.dp_replicate} has no "
        "meaning there.",
        "Use dp_replicate 1, or hsdp.",
    )


def _lora_targets_exist(case: _Case) -> _Broken:
    adapter = case.workload.adapter
    if adapter is None:
        return None
    known = case.model.linears
    unknown = [name for name in adapter.target_modules if name not in known]
    if adapter.target_modules and not unknown:
        return None
    given = ", ".join(unknown) if unknown else "none"
    experts = case.model.num_moe_layers
    return (
        f"LoRA target modules that {case.model.name} does not have: {given}.",
        f"Projections of every layer: {', '.join(known)}."
        + (" Experts are stacked parameters, which LoRA here does not reach." * bool(experts)),
    )


def _lora_rank_is_low(case: _Case) -> _Broken:
    adapter = case.workload.adapter
    if adapter is None:
        return None
    shapes = [s for name, s in case.model.linears.items() if name in adapter.target_modules]
    smallest = min((min(shape) for shape in shapes), default=adapter.r)
    if adapter.r <= smallest:
        return None
    return (
        f"LoRA rank {adapter.r} is above the smallest side of a target projection, {smallest}.",
        f"Use r of {smallest} or less.",
    )


def _tensor_parallel_splits(case: _Case) -> _Broken:
    return tensor_parallel_splits(case.plan, case.model, case.workload)


def _dropout_can_be_recomputed(case: _Case) -> _Broken:
    adapter, plan = case.workload.adapter, case.plan
    if adapter is None or not adapter.dropout:
        return None
    if plan.engine is not Engine.FSDP2 or plan.recompute is Recompute.NONE:
        return None
    return (
        f"LoRA dropout {adapter.dropout} with FSDP2's recomputation: accelerate recomputes without "
        "restoring the random state, so forward and backward would drop different values.",
        "Set the dropout to 0, or leave recomputation out.",
    )


def _no_router_loss(case: _Case) -> _Broken:
    if not case.model.hf_config.get("output_router_logits"):
        return None
    return (
        f"The config of {case.model.name} has output_router_logits: true, which adds the routers' "
        "balancing loss to the model's; the loss here is that of the tokens alone.",
        "Set output_router_logits to false in its config.json.",
    )


# Config keys of the families read here that make a layer draw random numbers.
_RANDOM_LAYERS = ("attention_dropout", "embd_pdrop", "resid_pdrop", "router_jitter_noise")


def _model_noise_can_be_recomputed(case: _Case) -> _Broken:
    drawn = [key for key in _RANDOM_LAYERS if case.model.hf_config.get(key)]
    plan = case.plan
    if not drawn or plan.engine is not Engine.FSDP2 or plan.recompute is Recompute.NONE:
        return None
    return (
        f"The config of {case.model.name} sets {' and '.join(drawn)} with FSDP2's recomputation: "
        "accelerate recomputes without restoring the random state, so forward and backward would "
        "draw different values.",
        "Set them to 0 in its config.json, or leave recomputation out.",
    )


# Of FlashAttention 2, on CUDA: the largest head, and what its size is a multiple of.
_FLASH_HEAD, _FLASH_HEAD_STEP = 256, 8


def _ring_can_attend(case: _Case) -> _Broken:
    plan, model, workload = case.plan, case.model, case.workload
    if plan.cp == 1 or plan.cp_backend is not CpBackend.RING:
        return None
    on_cuda = not case.hardware.gpu.is_cpu
    head, stride = model.head_dim, plan.heads_k_stride
    windowed = model.num_window_layers_at(workload.seq_len)
    refused = {
        f"a sliding window of {model.sliding_window} tokens, in sequences of {workload.seq_len}":
            windowed > 0,
        "attention sinks": model.sinks,
        "attention_dropout": bool(model.hf_config.get("attention_dropout")),
        "fp32 on GPUs (FlashAttention is of 16 bits)":
            on_cuda and workload.precision is Precision.FP32,
        f"heads of {head} on GPUs (multiples of {_FLASH_HEAD_STEP} up to {_FLASH_HEAD})":
            on_cuda and (head > _FLASH_HEAD or head % _FLASH_HEAD_STEP > 0),
        f"heads_k_stride {stride} with {model.num_kv_heads} key-value heads, which it must divide":
            workload.packing and model.num_kv_heads % stride > 0,
    }  # fmt: skip
    named = [what for what, broken in refused.items() if broken]
    if not named:
        return None
    return (f"Ring attention cannot do {' nor '.join(named)}.", "Use Ulysses, or cp 1.")


def _second_copy_fits(case: _Case) -> _Broken:
    plan, ranks = case.plan, case.hardware.num_gpus
    if plan.hpz == 1:
        return None
    fits = ranks % plan.hpz == 0 and plan.hpz < ranks
    if plan.engine is Engine.DEEPSPEED and plan.zero_stage == 3 and fits:
        if not plan.offload_params and plan.cp == 1:
            return None
        return (
            f"ZeRO++ hpZ (zero_hpz_partition_size {plan.hpz}) with offloaded parameters or "
            "sequence parallelism was never run.",
            "Leave the one or the other out.",
        )
    legal = [str(size) for size in range(2, ranks) if ranks % size == 0]
    return (
        f"ZeRO++ hpZ (zero_hpz_partition_size {plan.hpz}) on {ranks} ranks of {plan.engine}"
        f"{f' stage {plan.zero_stage}' if plan.zero_stage else ''}: the second copy belongs to "
        "ZeRO-3, on groups that divide the ranks and are fewer.",
        f"Sizes here: {', '.join(legal)}." if legal else "Use more ranks, or remove it.",
    )


RULES: dict[str, Callable[[_Case], _Broken]] = {
    "AT102": _cp_divides_ranks,
    "AT103": _batch_divides,
    "AT104": _batch_is_exact,
    "AT105": _cp_divides_sequence,
    "AT106": _cp_divides_heads,
    "AT107": _hybrid_needs_both,
    "AT108": _fsdp_shards,
    "AT109": _zero_stage,
    "AT110": _offload_fits_engine,
    "AT111": _ddp_replicates,
    "AT112": _deepspeed_shards_over_all,
    "AT113": _lora_targets_exist,
    "AT114": _lora_rank_is_low,
    "AT115": _tensor_parallel_splits,
    "AT119": _dropout_can_be_recomputed,
    "AT120": _no_router_loss,
    "AT121": _model_noise_can_be_recomputed,
    "AT122": _ring_can_attend,
    "AT150": _second_copy_fits,
    # Last, because where another rule is broken too, that one says why.
    "AT101": _world_size,
}
_STRATEGY_RULES = ("AT116", "AT117")
_FILE_RULES = tuple(f"AT{number}" for number in range(151, 159))
"""Of keys in a file that exclude one another: `autotune.config.combinations`."""


def rule_codes() -> list[str]:
    """Return every code that a refusal can carry."""
    return sorted([*RULES, *TRAINING_RULES, *_STRATEGY_RULES, *_FILE_RULES])
