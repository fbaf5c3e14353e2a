"""One small random model of each family, with every trait that makes the family its own."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

_SMALL = {
    "vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 16, "intermediate_size": 208,
    "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip
WINDOW = 20
_EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2}

CONFIGS = {
    "gemma3": _SMALL | {
        "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"],
        "sliding_window": WINDOW, "sliding_window_pattern": 2, "query_pre_attn_scalar": 24,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
    "gpt_oss": _SMALL | _EXPERTS | {
        "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "sliding_window": WINDOW,
    },
    "mistral": _SMALL | {
        "model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": WINDOW,
    },
    "mixtral": _SMALL | _EXPERTS | {
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"],
    },
    "olmo2": _SMALL | {"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"]},
    "phi3": {k: v for k, v in _SMALL.items() if k != "head_dim"} | {
        "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "sliding_window": WINDOW,
    },
    "qwen2": {k: v for k, v in _SMALL.items() if k != "head_dim"} | {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "sliding_window": WINDOW,
        "use_sliding_window": True, "max_window_layers": 2,
    },
    "qwen3_moe": _SMALL | {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
        "norm_topk_prob": True,
    },
}  # fmt: skip


def build(config, *, attention, experts, dtype=torch.float32):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config),
        dtype=dtype,
        attn_implementation=attention,
        experts_implementation=experts,
    )
    return model.to(dtype)  # gpt-oss would keep its norms in fp32
