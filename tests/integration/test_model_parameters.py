"""The catalogue's configs build in transformers and hold exactly the parameters we count."""

import pytest

from autotune.spec.catalogue import read_catalogue
from autotune.spec.model import load_model, model_from_config
from autotune.spec.workload import Lora

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.integration,
    # peft reads a property transformers 5 has renamed.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
]


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
    config = real.config
    assert config.max_position_embeddings == spec.hf_config["max_position_embeddings"]
    assert config.rope_parameters["rope_theta"] == spec.hf_config["rope_parameters"]["rope_theta"]
    layer = real.model.layers[0]
    assert sum(p.numel() for p in layer.parameters()) == spec.num_parameters_per_layer
    shapes = {
        n.rsplit(".", 1)[-1]: (m.in_features, m.out_features)
        for n, m in layer.named_modules()
        if isinstance(m, torch.nn.Linear)
    }
    assert shapes == spec.linears


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
    ],
)
def test_config_variants(extra):
    config = SMALL | extra
    real = build(config)
    expected = sum(p.numel() for p in real.parameters())
    assert model_from_config("small", config).num_parameters == expected


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("gate_proj", "down_proj", "o_proj")])
def test_adapter_parameters(targets):
    peft = pytest.importorskip("peft")
    spec = load_model("tiny-qwen3")
    lora = peft.LoraConfig(r=4, target_modules=list(targets), task_type="CAUSAL_LM")
    real = peft.get_peft_model(build(spec.hf_config), lora)
    trainable = sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert spec.num_adapter_parameters(Lora(r=4, target_modules=targets)) == trainable
