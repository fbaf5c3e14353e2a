"""Small models of families this package has no table of."""

_SHAPE = {
    "vocab_size": 512, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8,
    "intermediate_size": 704, "max_position_embeddings": 1024, "bos_token_id": 1,
    "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
_GROUPED = _SHAPE | {"num_key_value_heads": 4}
_EXPERTS = _GROUPED | {"num_experts_per_tok": 2, "num_local_experts": 8, "num_experts": 8}
_GPT2 = {
    "vocab_size": 512, "n_embd": 256, "n_layer": 4, "n_head": 8, "n_positions": 1024,
    "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip

OTHER_FAMILIES = {
    "cohere2": _GROUPED | {"sliding_window": 512},
    "deepseek_v3": _SHAPE | {
        "num_key_value_heads": 8, "q_lora_rank": 64, "kv_lora_rank": 32, "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 32, "v_head_dim": 32, "n_routed_experts": 8, "num_experts_per_tok": 2,
        "moe_intermediate_size": 192, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
    },
    "glm4": _GROUPED | {"head_dim": 32},
    "gpt2": _GPT2,
    "gpt_neox": _SHAPE,
    "granite": _GROUPED,
    "llama4_text": _EXPERTS | {
        "head_dim": 32, "intermediate_size_mlp": 704, "interleave_moe_layer_step": 2,
    },
    "nemotron": _GROUPED,
    "olmo3": _GROUPED,
    "olmoe": _EXPERTS | {"intermediate_size": 192},
    "opt": {k: v for k, v in _SHAPE.items() if k != "intermediate_size"} | {
        "ffn_dim": 1024, "word_embed_proj_dim": 256,
    },
    "phimoe": _EXPERTS | {"intermediate_size": 192},
    "smollm3": _GROUPED,
    "stablelm": _GROUPED,
    "starcoder2": _GROUPED,
}  # fmt: skip


def config_of(family):
    """Return the config.json of a family's small model."""
    return OTHER_FAMILIES[family] | {"model_type": family}
