import json

import pytest

from autotune.errors import AutotuneError
from autotune.spec.catalogue import read_catalogue
from autotune.spec.model import load_model, model_from_config
from autotune.spec.workload import Lora

# Totals the repositories' safetensors metadata state on the Hugging Face Hub.
PUBLISHED = {
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    model = load_model(name)
    assert model.num_parameters == model.num_active_parameters == PUBLISHED[name]


def test_every_published_model_of_the_catalogue_is_checked():
    assert {k for k, entry in read_catalogue("models").items() if "hub" in entry} == set(PUBLISHED)


@pytest.mark.parametrize(("name", "tied"), [("tiny-qwen3", True), ("tiny-llama", False)])
def test_tiny_models_have_their_stated_size(name, tied):
    model = load_model(name)
    assert (model.hidden_size, model.num_layers, model.num_heads) == (256, 4, 8)
    assert (model.num_kv_heads, model.head_dim, model.ffn_size) == (4, 32, 768)
    assert (model.vocab_size, model.tied_embeddings) == (4096, tied)
    assert model.hf_config["max_position_embeddings"] == 4096
    assert model.weights is None and model.tokenizer is None


def test_hub_id_and_case():
    published, shape = load_model("Qwen/Qwen3-8B"), load_model("QWEN3-8b")
    assert published.hf_config == shape.hf_config
    assert (published.weights, published.tokenizer) == ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B")
    assert (shape.weights, shape.tokenizer) == (None, "Qwen/Qwen3-8B")


def test_local_folder(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(load_model("tiny-llama").hf_config))
    bare = load_model(str(folder))
    assert (bare.name, bare.weights, bare.tokenizer) == ("mine", None, None)
    assert bare.num_parameters == load_model("tiny-llama").num_parameters
    (folder / "model.safetensors").touch()
    (folder / "tokenizer.json").touch()
    full = load_model(str(folder / "config.json"))
    assert full.weights == full.tokenizer == str(folder)


def test_unknown_name_says_the_nearest():
    with pytest.raises(AutotuneError, match=r"'qwen3-9b'.*Nearest: qwen3-8b"):
        load_model("qwen3-9b")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a JSON file"),
        ("[1]", "no JSON object"),
        ('{"model_type": "mixtral"}', "model_type 'mixtral', which is not supported"),
        ("{}", "model_type None"),
        ('{"model_type": "llama"}', "must be a positive whole number, not None"),
        (
            '{"model_type": "llama", "hidden_size": 100, "num_attention_heads": 3}',
            "100 is not a multiple of num_attention_heads 3",
        ),
        (
            '{"model_type": "llama", "hidden_size": "x", "num_attention_heads": 3}',
            "hidden_size must be a positive whole number",
        ),
    ],
)
def test_bad_config(tmp_path, content, message):
    file = tmp_path / "config.json"
    file.write_text(content)
    with pytest.raises(AutotuneError, match=message):
        load_model(str(file))


def test_missing_paths(tmp_path):
    with pytest.raises(AutotuneError, match="no such file or folder"):
        load_model(str(tmp_path / "nowhere"))
    with pytest.raises(AutotuneError, match=r"has no config\.json"):
        load_model(str(tmp_path))


def test_adapter_parameters():
    model = load_model("tiny-qwen3")
    # q_proj 256 -> 256 and v_proj 256 -> 128, four layers.
    assert model.num_adapter_parameters(Lora(r=2, target_modules=("q_proj", "v_proj"))) == (
        4 * 2 * (512 + 384)
    )


def test_biases_are_counted():
    config = load_model("tiny-llama").hf_config
    plain = model_from_config("x", config).num_parameters
    biased = model_from_config("x", config | {"attention_bias": True, "mlp_bias": True})
    assert biased.num_parameters - plain == 4 * (256 + 128 + 128 + 256 + 768 + 768 + 256)
