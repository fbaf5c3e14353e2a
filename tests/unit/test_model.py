import json

import pytest

from autotune.errors import AutotuneError
from autotune.spec.catalogue import read_catalogue
from autotune.spec.model import load_model, model_from_config
from autotune.spec.model.families import FAMILIES
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
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.3-70b": 70_553_706_496,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "mixtral-8x7b": 46_702_792_704,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
    "phi-4": 14_659_507_200,
    "phi-4-mini": 3_836_021_760,
    # The totals of the bf16 checkpoints: the published mxfp4 files count packed blocks.
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "olmo-2-1b": 1_484_916_736,
    "olmo-2-7b": 7_298_617_344,
    "olmo-2-13b": 13_716_198_400,
    "olmo-2-32b": 32_234_279_936,
}
# These repositories hold a vision tower and its projection as well: one tower (SigLIP So400m) for
# all sizes, and a projection from its width to the text model's with a norm over the tower's.
WITH_VISION = {
    "gemma-3-4b": 4_300_079_472,
    "gemma-3-12b": 12_187_325_040,
    "gemma-3-27b": 27_432_406_640,
}
TOWER, TOWER_SIZE = 416_866_032, 1152

# Billions the model cards state; gpt-oss's leaves out the input embedding (arXiv:2508.10925).
ACTIVE = {
    "mixtral-8x7b": 12.9,
    "qwen3-30b-a3b": 3.3,
    "qwen3-235b-a22b": 22,
    "gpt-oss-20b": 3.61,
    "gpt-oss-120b": 5.13,
}

# What the published config.json state and no parameter count depends on: window, RoPE's base (of
# Gemma 3 in full and in windowed layers), positions, RMSNorm's epsilon, and where RoPE is scaled
# the positions before it. UNSURE: not known from the published file itself.
UNSURE = object()
QWEN3 = (None, 1e6, 40960, 1e-6, None)
LLAMA3 = (None, 5e5, 131072, 1e-5, 8192)
OLMO2 = (None, 5e5, 4096, 1e-6, None)
GEMMA3_THETA = (1e6, 1e4)
CONFIGS = {
    "qwen3-0.6b": QWEN3,
    "qwen3-1.7b": QWEN3,
    "qwen3-4b": QWEN3,
    "qwen3-8b": QWEN3,
    "qwen3-14b": QWEN3,
    "qwen3-32b": QWEN3,
    "qwen3-30b-a3b": QWEN3,
    "qwen3-235b-a22b": QWEN3,
    "qwen2.5-0.5b": (32768, 1e6, 32768, 1e-6, None),
    "qwen2.5-1.5b": (131072, 1e6, 131072, 1e-6, None),
    "qwen2.5-3b": (32768, 1e6, 32768, 1e-6, None),
    "qwen2.5-7b": (131072, 1e6, 131072, 1e-6, None),
    "qwen2.5-14b": (131072, 1e6, 131072, 1e-5, None),
    "qwen2.5-32b": (UNSURE, 1e6, 131072, 1e-5, None),
    "qwen2.5-72b": (UNSURE, 1e6, 131072, 1e-5, None),
    "llama-3.1-8b": LLAMA3,
    "llama-3.1-70b": LLAMA3,
    "llama-3.1-405b": LLAMA3,
    "llama-3.2-1b": LLAMA3,
    "llama-3.2-3b": LLAMA3,
    "llama-3.3-70b": LLAMA3,
    "mistral-7b-v0.1": (4096, 1e4, 32768, 1e-5, None),
    "mistral-7b-v0.3": (None, 1e6, 32768, 1e-5, None),
    "mixtral-8x7b": (None, 1e6, 32768, 1e-5, None),
    "gemma-3-270m": (512, GEMMA3_THETA, 32768, 1e-6, None),
    "gemma-3-1b": (512, GEMMA3_THETA, 32768, 1e-6, None),
    "gemma-3-4b": (1024, GEMMA3_THETA, 131072, 1e-6, None),
    "gemma-3-12b": (1024, GEMMA3_THETA, 131072, 1e-6, None),
    "gemma-3-27b": (1024, GEMMA3_THETA, 131072, 1e-6, None),
    "phi-4": (None, 250_000, 16384, 1e-5, None),
    "phi-4-mini": (262144, 1e4, 131072, 1e-5, 4096),
    "gpt-oss-20b": (128, 150_000, 131072, 1e-5, 4096),
    "gpt-oss-120b": (128, 150_000, 131072, 1e-5, 4096),
    "olmo-2-1b": OLMO2,
    "olmo-2-7b": OLMO2,
    "olmo-2-13b": OLMO2,
    "olmo-2-32b": OLMO2,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_published_window_rope_positions_and_epsilon(name):
    config = load_model(name).hf_config
    rope = config["rope_parameters"]
    theta = rope.get("rope_theta")
    if theta is None:
        theta = tuple(rope[f"{kind}_attention"]["rope_theta"] for kind in ("full", "sliding"))
    own = (
        config.get("sliding_window"),
        theta,
        config["max_position_embeddings"],
        config["rms_norm_eps"],
        rope.get("original_max_position_embeddings"),
    )
    for stated, published in zip(own, CONFIGS[name], strict=True):
        assert published is UNSURE or stated == published


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    model = load_model(name)
    assert model.num_parameters == PUBLISHED[name]
    if name not in ACTIVE:
        assert model.num_active_parameters == model.num_parameters


@pytest.mark.parametrize("name", WITH_VISION)
def test_text_models_inside_multi_modal_ones(name):
    model = load_model(name)
    projection = TOWER_SIZE * model.hidden_size + TOWER_SIZE
    assert model.num_parameters + TOWER + projection == WITH_VISION[name]


@pytest.mark.parametrize("name", ACTIVE)
def test_published_active_parameters(name):
    model = load_model(name)
    active = model.num_active_parameters
    if model.architecture == "gpt_oss":
        active -= model.num_embedding_parameters
    digits = len(str(ACTIVE[name]).partition(".")[2])
    cut = int(active / 10 ** (9 - digits)) / 10**digits  # Qwen3's card has 3.3 for 3.35
    assert ACTIVE[name] in (round(active / 1e9, digits), cut)


def test_every_published_model_of_the_catalogue_is_checked():
    entries = read_catalogue("models").items()
    published = {key for key, entry in entries if {"hub", "config_of"} & entry.keys()}
    assert published == {*PUBLISHED, *WITH_VISION} == CONFIGS.keys()
    assert {k for k in published if load_model(k).moe} == set(ACTIVE)
    assert all("summary" in entry for _, entry in entries if "hub" not in entry)


@pytest.mark.parametrize("name", sorted(read_catalogue("models")))
def test_configs_are_complete(name):
    model = load_model(name)
    stated = set(model.hf_config)
    assert {"max_position_embeddings", "rope_parameters", "rms_norm_eps", "dtype"} <= stated
    assert {"hidden_act", "hidden_activation"} & stated
    assert model.hf_config["architectures"] == [FAMILIES[model.architecture].causal_lm]


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
        ('{"model_type": "falcon"}', "model_type 'falcon', which is not supported"),
        (
            '{"model_type": "bert", "architectures": ["BertForMaskedLM"]}',
            r"\(BertForMaskedLM\), which is no decoder that predicts the next token",
        ),
        ('{"model_type": "t5", "is_encoder_decoder": true}', "an encoder-decoder"),
        ('{"model_type": "vit", "image_size": 224}', "'vit', which reads images"),
        (
            '{"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}',
            "LlamaForSequenceClassification, which does not predict the next token.*LlamaForCausal",
        ),
        (
            '{"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}',
            r"multi-modal.*Its text_config \('gemma3_text'\) alone",
        ),
        (
            '{"model_type": "deepseek_v3", "auto_map": {"AutoModel": "x.Y"}}',
            r"own repository \(auto_map\), which is never run here. Supported",
        ),
        (
            '{"model_type": "llama", "architectures": ["MyForCausalLM"], "auto_map": {}}',
            "must be a positive whole number",  # an empty auto_map names no code
        ),
        (
            '{"model_type": "llama", "architectures": ["MyForCausalLM"], "auto_map": {"A": "b"}}',
            "is MyForCausalLM from the code in its own repository.*builds LlamaForCausalLM",
        ),
        (
            '{"model_type": "gemma3_text", "use_bidirectional_attention": true}',
            "attends in both directions",
        ),
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
        ('{"hidden_size": ' + "1" * 5000 + "}", "is not a JSON file"),
        ("[" * 100_000, "is not a JSON file"),
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


def test_auto_map_beside_a_class_transformers_has():
    config = load_model("phi-4-mini").hf_config | {"auto_map": {"AutoConfig": "x.Phi3Config"}}
    assert model_from_config("x", config).num_parameters == 3_836_021_760


def test_quantised_weights_are_refused_but_their_shape_is_not():
    config = load_model("gpt-oss-20b").hf_config | {
        "quantization_config": {"quant_method": "mxfp4"}
    }
    assert model_from_config("x", config).weights is None
    with pytest.raises(AutotuneError, match=r"'x' are quantised \(mxfp4\)"):
        model_from_config("x", config, weights="folder")


@pytest.mark.parametrize(
    ("name", "change", "window", "layers"),
    [
        ("mistral-7b-v0.1", {}, 4096, 32),
        ("mistral-7b-v0.3", {}, None, 0),
        ("gemma-3-1b", {}, 512, 22),
        ("gemma-3-1b", {"sliding_window_pattern": 2}, 512, 13),
        ("gpt-oss-20b", {}, 128, 12),
        ("gpt-oss-20b", {"layer_types": ["full_attention"] * 24}, None, 0),
        ("qwen2.5-7b", {}, None, 0),
        ("qwen2.5-7b", {"use_sliding_window": True}, None, 0),  # from layer 28 of 28
        ("qwen2.5-7b", {"use_sliding_window": True, "max_window_layers": 20}, 131072, 8),
        ("qwen3-30b-a3b", {"use_sliding_window": True, "sliding_window": 64}, 64, 48),
        ("llama-3.1-8b", {"sliding_window": 64}, None, 0),
    ],
)
def test_windows(name, change, window, layers):
    model = model_from_config("x", load_model(name).hf_config | change)
    assert (model.sliding_window, model.num_window_layers) == (window, layers)
    assert model.num_window_layers_at(window or 64) == 0
    assert model.num_window_layers_at((window or 64) + 1) == layers


def test_layer_types_that_are_not_known():
    config = load_model("gemma-3-270m").hf_config
    for types in (["chunked_attention"] * 18, ["full_attention"] * 17, 18, [[]] * 18):
        with pytest.raises(AutotuneError, match="layer_types must hold"):
            model_from_config("x", config | {"layer_types": types})


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gemma-3-1b", {"sliding_window_pattern": 0}),
        ("qwen2.5-7b", {"use_sliding_window": True, "max_window_layers": None}),
        ("qwen3-30b-a3b", {"decoder_sparse_step": "x"}),
        ("qwen3-30b-a3b", {"mlp_only_layers": 3}),
    ],
)
def test_a_malformed_choice_of_layers(name, change):
    with pytest.raises(AutotuneError, match="windowed or dense is malformed"):
        model_from_config("x", load_model(name).hf_config | change)


def test_dense_layers_between_sparse_ones():
    config = load_model("qwen3-30b-a3b").hf_config
    sparse = model_from_config("x", config)
    mixed = model_from_config("x", config | {"mlp_only_layers": [0, 5]})
    every_second = model_from_config("x", config | {"decoder_sparse_step": 2})
    dense = 3 * 2048 * 6144
    experts = 128 * (3 * 2048 * 768 + 2048)
    assert sparse.num_parameters - mixed.num_parameters == 2 * (experts - dense)
    assert sparse.num_parameters - every_second.num_parameters == 24 * (experts - dense)
    assert mixed.num_parameters_per_layer == sparse.num_parameters_per_layer
    assert (mixed.num_moe_layers, mixed.num_dense_layers) == (46, 2)
    assert model_from_config("x", config | {"decoder_sparse_step": 50}).moe is None


def test_more_experts_a_token_than_there_are():
    config = load_model("tiny-mixtral").hf_config | {"num_experts_per_tok": 9}
    with pytest.raises(AutotuneError, match="9 is above num_local_experts 8"):
        model_from_config("x", config)


def test_projections_by_family():
    assert list(load_model("phi-4").linears) == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    assert load_model("phi-4").linears["qkv_proj"] == (5120, 5120 + 2 * 1280)
    assert list(load_model("gpt-oss-20b").linears) == ["q_proj", "k_proj", "v_proj", "o_proj"]


def test_largest_module_is_the_experts():
    model = load_model("gpt-oss-120b")
    assert model.largest_parameter == 128 * 2880 * 5760
    assert model.largest_module == 128 * (3 * 2880 * 2880 + 5760 + 2880)
    assert load_model("gpt-oss-20b").largest_parameter == 201088 * 2880
    assert load_model("gemma-3-270m").largest_parameter == 262144 * 640
