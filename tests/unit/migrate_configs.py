"""Random FSDP1 configurations of Axolotl's, in every spelling, with a comment wherever one fits."""

from __future__ import annotations

import random

STRATEGIES = ("full_shard", "shard_grad_op", "hybrid_shard", "hybrid_shard_zero2")
CHOICES = {
    "offload_params": ("true", "false"),
    "cpu_ram_efficient_loading": ("true", "false"),
    "state_dict_type": ("FULL_STATE_DICT", "SHARDED_STATE_DICT", "'SHARDED_STATE_DICT'"),
    "auto_wrap_policy": ("TRANSFORMER_BASED_WRAP",),
    "transformer_layer_cls_to_wrap": ("LlamaDecoderLayer", '"LlamaDecoderLayer"'),
    "activation_checkpointing": ("true", "false"),
    "sync_module_states": ("true",),
    "use_orig_params": ("true", "false"),
    "limit_all_gathers": ("true",),
    "backward_prefetch": ("BACKWARD_PRE",),
    "backward_prefetch_policy": ("BACKWARD_POST",),
    "forward_prefetch": ("false", "true"),
    "sharding_strategy": ("FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD", "NO_SHARD", "2"),
}
OTHERS = (
    "datasets:\n  - path: corpus.jsonl   # {c}\n    type: completion\n",
    "weight_decay: 1e-2   # {c}\n",
    "special_tokens:\n",
    "wandb_name: 'a: b # c'\n",
    "sequence_len: 1_024\n",
    "lora_target_modules: [q_proj,\n  v_proj]  # {c}\n",
    "chat_template_jinja: |\n  {{{{ x }}}} # no comment\n  b\n",
)


def make_config(seed: int) -> tuple[str, list[str]]:
    """Return a file's text and its comments."""
    rng = random.Random(seed)
    comments: list[str] = []

    def comment() -> str:
        comments.append(f"comment {len(comments)}.")
        return comments[-1]

    def maybe_comment() -> str:
        return f"   # {comment()}" if rng.random() < 0.3 else ""

    words = _words(rng)
    entries = [text.format(c=comment()) if "{c}" in text else text.format()
               for text in rng.sample(OTHERS, rng.randint(1, len(OTHERS)))]  # fmt: skip
    if words:
        spelling = rng.choice(("flow", "block", "text"))
        if spelling == "flow":
            entries.append(f"fsdp: [{', '.join(words)}]{maybe_comment()}\n")
        elif spelling == "text":
            entries.append(f"fsdp: {' '.join(words)}{maybe_comment()}\n")
        else:
            indent = rng.choice(("", "  "))
            lines = "".join(f"{indent}- {word}{maybe_comment()}\n" for word in words)
            entries.append(f"fsdp:\n{lines}")
    config = _config(rng, comment, offload="offload" in words, needed=not words)
    if config:
        entries.append(config)
    if rng.random() < 0.5:
        entries.append(f"fsdp_version: 1{maybe_comment()}\n")
        if not config and not words:
            entries.pop()
    if any("hybrid" in word for word in words) or rng.random() < 0.2:
        entries.append("dp_replicate_size: 2\n")
    if rng.random() < 0.2:
        entries.append("fsdp_final_state_dict_type: FULL_STATE_DICT\n")
    rng.shuffle(entries)
    text = "base_model: tiny-llama\nlearning_rate: 2e-5\n"
    for entry in entries:
        before = rng.choice(("", "blank", "comment"))
        if before == "comment":
            text += f"# {comment()}\n"
        elif before == "blank":
            text += "\n"
        text += entry
    if rng.random() < 0.2:
        text = text.rstrip("\n")
    return text, comments


def _words(rng: random.Random) -> list[str]:
    if rng.random() < 0.3:
        return []
    words = [rng.choice(STRATEGIES)]
    return words + [word for word in ("offload", "auto_wrap") if rng.random() < 0.5]


def _config(rng, comment, *, offload: bool, needed: bool) -> str:
    names = rng.sample(sorted(CHOICES), rng.randint(int(needed), len(CHOICES)))
    if offload:
        names = [name for name in names if name != "offload_params"]
    if not names:
        return "fsdp_config: {use_orig_params: true}\n" if needed else ""
    pairs = [(rng.choice(("", "fsdp_")) + name, rng.choice(CHOICES[name])) for name in names]
    if rng.random() < 0.2:
        return f"fsdp_config: {{{', '.join(f'{key}: {value}' for key, value in pairs)}}}\n"
    lines = "".join(
        (f"  # {comment()}\n" if rng.random() < 0.15 else "")
        + f"  {key}: {value}"
        + (f"  # {comment()}" if rng.random() < 0.2 else "")
        + "\n"
        for key, value in pairs
    )
    return f"fsdp_config:\n{lines}"
