"""The catalogue's configs build in transformers and hold exactly the parameters we count."""

import pytest

from autotune.emit.axolotl import decoder_layer_class
from autotune.spec.catalogue import read_catalogue
from autotune.spec.model import load_model, model_from_config
from autotune.spec.workload import Lora

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.integration


def build(config):
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**config)
        )


@pytest.mark.parametrize("name", sorted(read_catalogue("models")))
def test_catalogue(name):
    spec = load_model(name)
    real = build(spec.hf_config)
    assert sum(p.numel() for p in real.parameters()) == spec.num_parameters
    assert real.config.max_position_embeddings == spec.hf_config["max_position_embeddings"]
    assert thetas(real.config.rope_parameters) == thetas(spec.hf_config["rope_parameters"])
    layers = list(real.model.layers)
    assert max(map(count, layers)) == spec.num_parameters_per_layer
    assert len(layers) == spec.num_layers
    windows = [layer.self_attn for layer in layers]
    windows = [getattr(a, "sliding_window", None) or window_of(a.config) for a in windows]
    assert sum(window is not None for window in windows) == spec.num_window_layers
    assert set(windows) <= {None, spec.sliding_window}
    layer = layers[-1]
    assert any(type(layer).__name__ == name for name in real._no_split_modules)
    assert type(layer).__name__ == decoder_layer_class(spec)
    shapes = {
        n.rsplit(".", 1)[-1]: (m.in_features, m.out_features)
        for n, m in layer.named_modules()
        if isinstance(m, torch.nn.Linear)
    }
    assert shapes == spec.linears
    assert max(p.numel() for p in real.parameters()) == spec.largest_parameter
    modules = (sum(p.numel() for p in m.parameters(recurse=False)) for m in real.modules())
    assert max(modules) == spec.largest_module


def count(module):
    return sum(p.numel() for p in module.parameters())


def thetas(rope):
    """The bases by layer type, or the one of all layers."""
    if "rope_theta" in rope:
        return rope["rope_theta"]
    return {kind: parameters["rope_theta"] for kind, parameters in rope.items()}


def window_of(config):
    """Some attention modules look at the config for the window of all layers."""
    return config.sliding_window if config.model_type in ("mistral", "mixtral", "phi3") else None


SMALL = {
    "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6,
    "intermediate_size": 160, "vocab_size": 512,
}  # fmt: skip


@pytest.mark.parametrize(
    "extra",
    [
        {"model_type": "qwen2", "num_key_value_heads": 2},
        {"model_type": "mistral", "num_key_value_heads": 3},
        {"model_type": "mistral", "num_key_value_heads": 3, "head_dim": 32},
        {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
        {"model_type": "llama", "num_key_value_heads": 2, "tie_word_embeddings": True},
        {"model_type": "qwen3", "num_key_value_heads": 2, "attention_bias": True},
        {"model_type": "gemma3_text"},
        {"model_type": "gemma3_text", "tie_word_embeddings": False, "head_dim": 32},
        {"model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2},
        {
            "model_type": "gpt_oss",
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "attention_bias": False,
            "num_attention_heads": 8,
        },
        {
            "model_type": "mixtral",
            "num_key_value_heads": 2,
            "num_local_experts": 3,
            "num_experts_per_tok": 1,
        },
        {"model_type": "olmo2", "num_key_value_heads": 3, "attention_bias": True},
        {"model_type": "phi3", "num_key_value_heads": 3, "pad_token_id": 0},
        {
            "model_type": "qwen3_moe",
            "num_key_value_heads": 3,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
            "mlp_only_layers": [1],
        },
        {
            "model_type": "qwen3_moe",
            "num_key_value_heads": 3,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
            "decoder_sparse_step": 2,
        },
    ],
)
def test_config_variants(extra):
    config = SMALL | extra
    real = build(config)
    expected = sum(p.numel() for p in real.parameters())
    assert model_from_config("small", config).num_parameters == expected


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("tiny-qwen3", ("q_proj", "v_proj")),
        ("tiny-qwen3", ("gate_proj", "down_proj", "o_proj")),
        ("tiny-mixtral", ("q_proj", "o_proj")),
        ("phi-4-mini", ("qkv_proj", "gate_up_proj", "down_proj")),
    ],
)
def test_adapter_parameters(name, targets):
    peft = pytest.importorskip("peft")
    spec = load_model(name)
    lora = peft.LoraConfig(r=4, target_modules=list(targets), task_type="CAUSAL_LM")
    real = peft.get_peft_model(build(spec.hf_config), lora)
    trainable = sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert spec.num_adapter_parameters(Lora(r=4, target_modules=targets)) == trainable
