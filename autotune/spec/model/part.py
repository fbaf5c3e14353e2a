"""The part of a model that one of `tp` tensor-parallel ranks works on."""

from __future__ import annotations

from autotune.spec.model.shape import ModelSpec


def tensor_part(model: ModelSpec, tp: int, *, whole_vocabulary: bool = False) -> ModelSpec:
    """Return a thinner model: a rank's heads, FFN features and rows of the vocabulary.

    The hidden size and the norms stay whole. Its layers hold and compute what a rank's do, but for
    the sums over the ranks. `autotune.tensor_rules` says which models can be split so.

    Args:
        model: The whole.
        tp: Ranks; 1 returns the model itself.
        whole_vocabulary: Keep the vocabulary whole: each rank holds the logits of all of it.
    """
    if tp == 1:
        return model
    vocab_size = model.vocab_size if whole_vocabulary else model.vocab_size // tp
    config = model.hf_config | {
        "num_attention_heads": model.num_heads // tp,
        "num_key_value_heads": model.num_kv_heads // tp,
        "head_dim": model.head_dim,
        "intermediate_size": model.ffn_size // tp,
        "vocab_size": vocab_size,
    }
    return model.model_copy(
        update={
            "num_heads": model.num_heads // tp,
            "num_kv_heads": model.num_kv_heads // tp,
            "ffn_size": model.ffn_size // tp,
            "vocab_size": vocab_size,
            "hf_config": config,
        }
    )
