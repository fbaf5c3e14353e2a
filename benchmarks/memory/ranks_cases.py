"""The configurations `ranks.py` measures: small models of seven architectures, every engine.

Each model is large enough that states and activations are most of its peak, and small enough that
a launch takes seconds on one core a rank. The settings rotate against the strategies, so that every
architecture meets each strategy at another split.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from autotune.plan import CpBackend, Engine, Plan, Recompute
from autotune.spec.workload import Lora, Workload

_SHAPE = {
    "vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 32, "intermediate_size": 704,
    "max_position_embeddings": 1024, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "rms_norm_eps": 1e-6,
}  # fmt: skip
_WITHOUT_HEAD_DIM = {k: v for k, v in _SHAPE.items() if k != "head_dim"}
_EXPERTS = {"num_experts_per_tok": 2, "intermediate_size": 384}

MODELS: dict[str, dict[str, Any]] = {
    "qwen3": _SHAPE | {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "llama": _SHAPE | {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False,
    },
    "mixtral": _SHAPE | _EXPERTS | {
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4,
        "tie_word_embeddings": False,
    },
    "gemma3": _SHAPE | {
        "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"],
        "sliding_window": 192, "sliding_window_pattern": 2, "query_pre_attn_scalar": 32,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
    "phi3": _WITHOUT_HEAD_DIM | {
        "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "tie_word_embeddings": False,
    },
    "qwen3_moe": _SHAPE | _EXPERTS | {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 8,
        "moe_intermediate_size": 192, "norm_topk_prob": True, "tie_word_embeddings": False,
    },
    "olmo2": _SHAPE | {
        "model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"], "tie_word_embeddings": True,
        "num_hidden_layers": 6,
    },
}  # fmt: skip
_SMALL_VOCABULARY = 512
"""Where loss and head need little, a layer's backward is highest."""
MODELS |= {
    f"{name}-v{_SMALL_VOCABULARY}": config | {"vocab_size": _SMALL_VOCABULARY}
    for name, config in MODELS.items()
}
_DEEP = ("llama", "gemma3", "phi3", "olmo2")
MODELS |= {
    f"{name}-deep": MODELS[f"{name}-v{_SMALL_VOCABULARY}"]
    | {"num_hidden_layers": 8, "hidden_size": 512, "intermediate_size": 1408}
    for name in _DEEP
}
"""Deep and of a small vocabulary: here the engines' parts decide the peak."""
TUNE = ("qwen3", "llama", "mixtral")
"""Architectures whose runs were looked at while the compositions were written; the others are held
out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One configuration."""

    architecture: str
    plan: Plan
    workload: Workload

    @property
    def split(self) -> str:
        """``tune`` or ``held_out``."""
        return "tune" if self.architecture.split("-")[0] in TUNE else "held_out"

    @property
    def name(self) -> str:
        """Unique text."""
        plan, workload = self.plan, self.workload
        words = [
            self.architecture, plan.strategy, f"r{plan.world_size}", f"cp{plan.cp}",
            f"s{workload.seq_len}", f"b{plan.micro_batch_size}", f"ga{plan.grad_accum_steps}",
            "packed" if workload.packing else "plain", plan.recompute.value,
        ]  # fmt: skip
        if plan.cp_backend is CpBackend.RING:
            words.append("ring")
        if plan.tp > 1:
            words.append(f"tp{plan.tp}")
        if workload.adapter:
            words.append("lora")
        if workload.precision != "bf16":
            words.append(workload.precision.value)
        return "/".join(words)


_ZERO: dict[str, Any] = {"engine": Engine.DEEPSPEED, "dp_shard": 2}
_FSDP2: dict[str, Any] = {"engine": Engine.FSDP2, "dp_shard": 2}
_STRATEGIES: tuple[dict[str, Any], ...] = (
    {"strategy": "ddp", "engine": Engine.DDP, "dp_replicate": 2},
    _ZERO | {"strategy": "zero1", "zero_stage": 1},
    _ZERO | {"strategy": "zero2", "zero_stage": 2},
    _ZERO | {"strategy": "zero3", "zero_stage": 3},
    _FSDP2 | {"strategy": "fsdp2"},
    _FSDP2 | {"strategy": "fsdp2_no_reshard", "reshard_after_forward": False},
    _FSDP2 | {"strategy": "hsdp", "dp_replicate": 2},
    _ZERO | {"strategy": "zero2_offload_optimizer", "zero_stage": 2, "offload_optimizer": True},
    _ZERO | {"strategy": "zero3_offload_params", "zero_stage": 3, "offload_optimizer": True,
             "offload_params": True},
    _FSDP2 | {"strategy": "fsdp2_offload", "offload_optimizer": True, "offload_params": True},
    _ZERO | {"strategy": "zero2", "zero_stage": 2, "dp_shard": 1, "cp": 2},
    _FSDP2 | {"strategy": "fsdp2", "dp_shard": 2, "cp": 2},
    _ZERO | {"strategy": "zero3", "zero_stage": 3, "dp_shard": 4},
)  # fmt: skip
_LORA_STRATEGIES = (1, 2, 3, 4, 0, 6, 5)
"""Indices into `_STRATEGIES`, one or two for each architecture."""
_ALONE = ("llama", "olmo2-v512")
"""Architectures measured on one rank, too, where nothing is sharded: as on one GPU."""
# Sequence, micro batch, accumulation, packed, recompute.
_SPLITS: tuple[tuple[int, int, int, bool, bool], ...] = (
    (256, 4, 1, False, False),
    (128, 8, 1, True, False),
    (512, 2, 1, False, True),
    (256, 2, 4, True, False),
    (128, 4, 1, False, True),
    (512, 1, 4, False, False),
    (256, 8, 1, True, True),
    (512, 2, 1, True, False),
    (128, 1, 4, False, False),
    (256, 1, 1, False, False),
    (512, 1, 4, True, True),
)
_DEEP_SPLITS = (
    (128, 1, 4, False, True), (256, 1, 1, True, False), (128, 2, 2, True, True),
    (256, 1, 4, False, False),
)  # fmt: skip


def cases() -> list[Case]:
    """Return all configurations, those to tune on first."""
    found: dict[str, Case] = {}
    whole = [name for name in MODELS if "-" not in name]
    for number, architecture in enumerate(whole):
        for position, strategy in enumerate(_STRATEGIES):
            split = _SPLITS[(3 * number + position) % len(_SPLITS)]
            case = _case(architecture, strategy, split)
            found[case.name] = case
        for turn in (0, 1):
            strategy = _STRATEGIES[_LORA_STRATEGIES[(2 * number + turn) % len(_LORA_STRATEGIES)]]
            split = _SPLITS[(5 * number + 2 * turn) % len(_SPLITS)]
            case = _case(architecture, strategy, split, adapter=_adapter(architecture))
            found[case.name] = case
    for number, architecture in enumerate(name for name in MODELS if "-v" in name):
        for turn in (0, 1):
            strategy = _STRATEGIES[(3 * number + 5 * turn) % 7]
            split = _SPLITS[(2 * number + 3 * turn) % len(_SPLITS)]
            case = _case(architecture, strategy, split)
            found[case.name] = case
    for number, name in enumerate(_DEEP):
        for position, strategy in enumerate(_STRATEGIES[:5]):
            split = _DEEP_SPLITS[(number + position) % len(_DEEP_SPLITS)]
            case = _case(f"{name}-deep", strategy, split)
            found[case.name] = case
    for number, architecture in enumerate(_ALONE):
        for position, strategy in enumerate(_STRATEGIES[:5]):
            alone = {k: 1 if k.startswith("dp_") else v for k, v in strategy.items()}
            split = _SPLITS[(2 * position + 3 * number) % len(_SPLITS)]
            case = _case(architecture, alone, split)
            found[case.name] = case
    return list(found.values())


def tensor_parallel_cases() -> list[Case]:
    """Return the configurations of two tensor-parallel ranks in each of two shards."""
    split = _FSDP2 | {"strategy": "fsdp2", "tp": 2}
    chosen = [
        *(("qwen3", _SPLITS[number]) for number in (0, 4, 7)),
        *(("llama", _SPLITS[number]) for number in (0, 3)),
        ("gemma3", _SPLITS[6]),
        *(("qwen3-v512", _SPLITS[number]) for number in (2, 5)),
        *((f"{name}-deep", _DEEP_SPLITS[n]) for n, name in enumerate(("llama", "gemma3"))),
    ]
    return [_case(architecture, split, sizes) for architecture, sizes in chosen]


def _case(
    architecture: str,
    strategy: dict[str, Any],
    split: tuple[int, int, int, bool, bool],
    adapter: Lora | None = None,
) -> Case:
    seq_len, micro_batch_size, grad_accum_steps, packing, recompute = split
    plan = Plan(
        **strategy,
        micro_batch_size=micro_batch_size,
        grad_accum_steps=grad_accum_steps,
        recompute=Recompute.FULL if recompute else Recompute.NONE,
        bucket_elements=2**17,
    )
    workload = Workload(
        seq_len=seq_len,
        global_batch_size=plan.global_batch_size,
        packing=packing,
        adapter=adapter,
    )
    return Case(architecture=architecture, plan=replace(plan), workload=workload)


def _adapter(architecture: str) -> Lora:
    if architecture == "phi3":
        return Lora(r=16, target_modules=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"))
    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    if architecture in ("mixtral", "qwen3_moe"):
        return Lora(r=16, target_modules=attention)
    return Lora(r=16)
