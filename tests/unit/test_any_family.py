"""Models of families without a table, as far as no training stack is needed."""

import pytest

from autotune.errors import AutotuneError
from autotune.memory.activations import count_activations
from autotune.memory.profiles import activation_profile
from autotune.memory.setup import Regime, TraceKey
from autotune.plan import Engine, Plan
from autotune.spec.model import any_family, load_model, model_from_config, tracer
from autotune.spec.model.any_family import model_of_any_family
from autotune.spec.workload import Lora, Workload

CONFIG = {"model_type": "granite", "hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 10}
ANSWER = {
    "causal_lm": "GraniteForCausalLM", "total": 160 + 16 + 2 * 600, "active": 160 + 16 + 2 * 400,
    "embedding": 160, "head": 0, "rest": 16, "layers": [600, 600], "matrices": [584, 584],
    "active_matrices": 768, "sizes": {"256": 2, "128": 4, "64": 2, "16": 2, "8": 1},
    "largest_module": 256,
    "projections": [
        {"path": "mlp.up_proj", "inputs": 16, "outputs": 16, "count": 2},
        {"path": "self_attn.q_proj", "inputs": 16, "outputs": 8, "count": 2},
        {"path": "mlp.shared.up_proj", "inputs": 16, "outputs": 4, "count": 1},
        {"path": "mlp.shared.down_proj", "inputs": 4, "outputs": 16, "count": 1},
    ],
    "attributes": {
        "hidden_size": 16, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "ffn_size": 16,
        "vocab_size": 10, "sliding_window": None, "num_window_layers": 0,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOTUNE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("AUTOTUNE_TRACE", raising=False)


@pytest.fixture
def asked(monkeypatch):
    """Requests that went to a child, which answers ANSWER."""
    requests = []

    def ask(request, limit_s, *, keep=False):
        requests.append(request)
        return {"model": ANSWER}

    monkeypatch.setattr(any_family, "ask", ask)
    monkeypatch.setattr(any_family, "can_trace", lambda: True)
    return requests


def test_counts_are_the_child_s(asked):
    model = model_of_any_family("g", CONFIG)
    assert asked == [{"config": CONFIG}]
    assert (model.num_parameters, model.num_active_parameters) == (1376, 976)
    assert (model.num_embedding_parameters, model.num_root_parameters) == (160, 176)
    assert model.tied_embeddings and model.num_layers == 2
    assert model.num_parameters_per_layer == 600
    assert (model.num_layer_matmul_parameters, model.num_matmul_parameters) == (1168, 768 + 160)
    assert (model.largest_parameter, model.largest_module) == (256, 256)
    # An adapter takes what every layer has, and PEFT all modules of that name.
    assert model.linears == {"up_proj": (16, 4), "q_proj": (16, 8)}
    assert model.num_adapter_parameters(Lora(r=2, target_modules=("up_proj",))) == 2 * (64 + 20)
    assert model.projections == [((16, 16), 2), ((16, 8), 2), ((16, 4), 1), ((4, 16), 1)]


def test_counted_once_then_cached(asked, monkeypatch):
    model = model_of_any_family("g", CONFIG)
    monkeypatch.setattr(any_family, "can_trace", lambda: False)
    monkeypatch.setattr("autotune.spec.model.tracer.can_trace", lambda: False)
    again = model_of_any_family("other", CONFIG | {"_name_or_path": "elsewhere"})
    assert len(asked) == 1 and again.counted == model.counted
    with pytest.raises(AutotuneError, match="install the training stack"):
        model_of_any_family("g", CONFIG | {"hidden_size": 32})


def test_a_corrupt_cache_is_counted_again(asked, tmp_path):
    model_of_any_family("g", CONFIG)
    (file,) = (tmp_path / "cache" / "models").glob("*.json")
    file.write_text("{}")
    assert model_of_any_family("g", CONFIG).num_parameters == 1376
    assert len(asked) == 2


def test_without_the_stack_nothing_is_guessed(asked, monkeypatch):
    model = model_of_any_family("g", CONFIG)
    monkeypatch.setattr("autotune.memory.profiles.can_trace", lambda: False)
    monkeypatch.setattr("autotune.spec.model.tracer.can_trace", lambda: False)
    with pytest.raises(AutotuneError, match="install the training stack"):
        activation_profile(model, TraceKey(regime=Regime.COMPUTE))
    plan = Plan(strategy="ddp", engine=Engine.DDP, micro_batch_size=1)
    with pytest.raises(AutotuneError, match="install the training stack"):
        count_activations(model, Workload(), plan)


@pytest.mark.parametrize("answered", [{"error": "no decoder"}, {"failure": "it ended with -9"}])
def test_what_the_child_refuses_is_one_message(monkeypatch, answered):
    monkeypatch.setattr(any_family, "ask", lambda *args, **kwargs: answered)
    monkeypatch.setattr(any_family, "can_trace", lambda: True)
    with pytest.raises(AutotuneError, match=r"^Model 'g': (no decoder|it ended with -9)$"):
        model_of_any_family("g", CONFIG)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architectures": ["GraniteForSequenceClassification"]}, "no decoder that predicts"),
        ({"is_encoder_decoder": True}, "an encoder-decoder"),
        ({"vision_config": {}}, "which reads images"),
        ({"text_config": {"model_type": "granite"}}, "is multi-modal"),
        ({"use_bidirectional_attention": True}, "attends in both directions"),
        ({"auto_map": {}, "architectures": ["OtherForCausalLM"]}, None),
        (
            {"auto_map": {"AutoModelForCausalLM": "m.Own"}, "architectures": ["OwnForCausalLM"]},
            "OwnForCausalLM from the code in its own repository.*builds GraniteForCausalLM",
        ),
    ],
)
def test_what_is_no_text_decoder_is_refused(asked, change, said):
    if said is None:
        assert model_of_any_family("g", CONFIG | change).counted
        return
    with pytest.raises(AutotuneError, match=said):
        model_of_any_family("g", CONFIG | change)


def test_quantised_weights_are_refused(asked):
    config = CONFIG | {"quantization_config": {"quant_method": "fp8"}}
    assert model_of_any_family("g", config).counted
    with pytest.raises(AutotuneError, match=r"quantised \(fp8\)"):
        model_of_any_family("g", config, weights="somewhere")


def test_a_known_family_asks_nobody(asked):
    config = load_model("tiny-llama").hf_config
    assert model_of_any_family("x", config) == model_from_config("x", config)
    assert not asked


def test_where_training_was_not_checked_it_says_what_works():
    with pytest.raises(AutotuneError, match="'estimate' and 'capacity' take any decoder"):
        model_from_config("g", CONFIG)
    with pytest.raises(AutotuneError) as caught:
        model_from_config("b", {"model_type": "bert", "architectures": ["BertForMaskedLM"]})
    assert "capacity" not in str(caught.value)


def test_a_child_that_ended_is_a_failure_with_its_reason(monkeypatch):
    """What it did not take is still in the pipe's buffer, and closing sends it again."""
    child = tracer._Child()
    child._process.kill()
    child._process.wait()
    monkeypatch.setattr(tracer, "_kept", [child])
    assert tracer.ask({"config": {}}, 5.0) == {"failure": "it ended with -9"}
