"""Traced profiles against tensors counted by hand and against real runs."""

import json
from dataclasses import replace

import numpy as np
import pytest

from autotune.errors import AutotuneError
from autotune.memory.closed_form import closed_form_profile
from autotune.memory.profile import features
from autotune.memory.profile_json import profile_from_json
from autotune.memory.profiles import activation_profile, trace_in_child
from autotune.memory.setup import Attention, Checkpointing, Loss, Regime, TraceKey
from autotune.spec.model import load_model, model_from_config
from autotune.spec.workload import Lora
from tests.integration.allocator import allocator_peak
from tests.integration.families import CONFIGS, WINDOW, build

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.integration,
    pytest.mark.usefixtures("one_thread"),
    # The name of transformers 5.17, deprecated in 5.23; peft reads another that was renamed.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
]

from accelerate.utils.operations import convert_outputs_to_fp32  # noqa: E402

from autotune.runner import ulysses  # noqa: E402
from autotune.runner.attention import WindowMasks  # noqa: E402
from autotune.runner.experts import EXPERTS_NAME, register_experts  # noqa: E402
from autotune.runner.loss import token_weighted_loss  # noqa: E402
from autotune.runner.trace.models import build as build_cut  # noqa: E402
from autotune.runner.trace.profiles import trace_profiles  # noqa: E402
from autotune.runner.ulysses import ATTENTION_NAME, document_mask, register_attention  # noqa: E402

register_attention()
register_experts()

BATCH, SEQ = 2, 256
KEY = TraceKey(regime=Regime.COMPUTE)
# Of the allocator's peak: in models this small, 5 KB of random state a recomputed layer count.
TOLERANCE = 0.01


def trace(config, key):
    return trace_profiles(config, [key])[0]


def at(polynomial, batch=BATCH, seq=SEQ):
    return float(features(batch, seq, 1) @ np.array(polynomial))


def phases(profile):
    layers = [profile.kinds[i] for i in profile.layers]
    yield profile.embedding_forward
    yield from (layer.forward for layer in layers)
    yield from (profile.head_forward, profile.loss_forward)
    yield from (profile.loss_backward, profile.head_backward)
    yield from (layer.backward for layer in reversed(layers))
    yield profile.embedding_backward


def traced_peak(profile, gradient_bytes, batch=BATCH, seq=SEQ):
    """The highest instant of a micro-step, with gradients that stay where they are made."""
    level = peak = 0.0
    for phase in phases(profile):
        for instant in phase.peaks:
            held = level + gradient_bytes * instant.gradient_elements
            peak = max(peak, held + at(instant.bytes, batch, seq))
        level += at(phase.end, batch, seq) + gradient_bytes * phase.gradient_elements
    return peak


def test_coefficients_against_tensors_counted_by_hand():
    """Llama in bf16: bytes a token of one layer, of the head and of the loss."""
    profile = trace(load_model("tiny-llama").hf_config, KEY)
    hidden, kv, heads, ffn, vocab, head_dim = 256, 128, 8, 768, 4096, 32
    norm = (
        4 * hidden  # its input in fp32, for the square and the product
        + 4  # the scale
        + 2 * hidden  # normalised in bf16, for the weight's gradient
        + 2 * hidden  # its output, which projections read
    )
    attention = (
        2 * hidden + 2 * kv + 2 * kv  # q, k and v as SDPA gets them
        + 2 * hidden  # its output, which the output projection reads
        + 4 * heads  # log-sum-exp
    )  # fmt: skip
    swiglu = 4 * 2 * ffn  # gate, its SiLU, up, their product
    layer = profile.kinds[profile.layers[2]].forward
    assert layer.end == (0, 0, 0, 2 * norm + attention + swiglu, 0, 0)

    logits, stream = 2 * vocab, 2 * hidden
    batch = 3 * 8  # ids, positions, labels
    tables = 2 * 2 * head_dim  # cosine and sine
    assert profile.embedding_forward.end[3] == batch + stream + tables
    # The first layer's input stays until the model returns, and goes with the last one's output.
    first = profile.kinds[profile.layers[0]].forward
    assert first.end[3] - layer.end[3] == stream
    assert profile.head_forward.end[3] == norm + logits - 2 * stream
    # log-softmax in fp32 stays, the logits go; between them lie the logits in fp32 as well.
    assert profile.loss_forward.end[3] == 2 * logits - logits
    assert max(peak.bytes[3] for peak in profile.loss_forward.peaks) == 2 * 2 * logits
    # The loss's gradient lies above the saved log-softmax, the logits' gradient below it.
    assert max(peak.bytes[3] for peak in profile.loss_backward.peaks) == 2 * 2 * logits
    assert profile.loss_backward.end[3] == logits - 2 * logits
    assert np.sum([phase.end for phase in phases(profile)], axis=0).tolist() == [0.0] * 6


def test_gradients_are_counted_once():
    model = load_model("tiny-qwen3")
    profile = trace(model.hf_config, KEY)
    assert sum(phase.gradient_elements for phase in phases(profile)) == model.num_parameters
    # The tied weight's gradient from the head waits for the embedding's.
    waiting = 2 * model.num_embedding_parameters
    assert profile.head_backward.end[0] == waiting
    assert profile.embedding_backward.end[0] == pytest.approx(-waiting, abs=64)


def train(config, key):
    """A real micro-step, wrapped as accelerate and DeepSpeed wrap the model."""
    bf16 = key.regime is Regime.COMPUTE
    dtype = torch.bfloat16 if bf16 else torch.float32
    model = build(config, attention=ATTENTION_NAME, experts=EXPERTS_NAME, dtype=dtype)
    model.config.use_cache = False
    if key.adapter:
        peft = pytest.importorskip("peft")
        lora = peft.LoraConfig(r=key.adapter.r, target_modules=list(key.adapter.target_modules))
        lora.task_type = "CAUSAL_LM"
        model = peft.get_peft_model(model, lora, autocast_adapter_dtype=False)
    model.train()
    if key.checkpointing is not Checkpointing.NONE:
        reentrant = key.checkpointing is Checkpointing.REENTRANT
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
    if key.regime is Regime.AUTOCAST:
        forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
        model.forward = convert_outputs_to_fp32(forward)
    ids, labels = torch.randint(0, 500, (2, BATCH, SEQ))
    documents = torch.zeros(BATCH, SEQ, dtype=torch.long)
    positions = torch.arange(SEQ).repeat(BATCH, 1)

    def loss():
        ulysses.CONTEXT.mask = document_mask(documents) if key.packed else None
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        return token_weighted_loss(logits, labels, torch.ones((), dtype=torch.long), 1)

    loss().backward()
    for parameter in model.parameters():
        parameter.grad = None


@pytest.fixture
def own_context(monkeypatch):
    context = ulysses.AttentionContext()
    context.windows = WindowMasks()
    monkeypatch.setattr(ulysses, "CONTEXT", context)


LORA = Lora(r=8, target_modules=("q_proj", "o_proj", "down_proj"))
QUICK = [
    ("qwen3_moe", TraceKey(regime=Regime.COMPUTE, packed=True)),
    ("olmo2", TraceKey(regime=Regime.AUTOCAST, adapter=LORA, checkpointing=Checkpointing.FULL)),
]
REAL = [
    ("olmo2", TraceKey(regime=Regime.FP32, adapter=LORA)),
]
REAL += [
    (family, TraceKey(regime=regime, packed=packed, checkpointing=checkpointing))
    for family in ("gemma3", "gpt_oss", "mistral", "mixtral", "olmo2", "phi3", "qwen2")
    for regime, packed, checkpointing in (
        (Regime.COMPUTE, False, Checkpointing.NONE),
        (Regime.COMPUTE, True, Checkpointing.REENTRANT),
        (Regime.AUTOCAST, True, Checkpointing.NONE),
        (Regime.AUTOCAST, False, Checkpointing.FULL),
        (Regime.FP32, True, Checkpointing.FULL),
    )
]
REAL += [
    (family, TraceKey(regime=regime, packed=packed, adapter=LORA, checkpointing=checkpointing))
    for family in ("mistral", "phi3")
    for regime, packed in ((Regime.COMPUTE, True), (Regime.AUTOCAST, False))
    for checkpointing in (Checkpointing.NONE, Checkpointing.FULL)
]


@pytest.mark.parametrize(
    ("family", "key"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in REAL)],
    ids=lambda value: value if isinstance(value, str) else f"{value.regime}-{value.packed}",
)
@pytest.mark.usefixtures("own_context")
def test_peak_of_a_real_run(family, key):
    config = CONFIGS[family]
    windowed = model_from_config(family, config).num_window_layers_at(SEQ) > 0
    key = replace(key, windowed=windowed)
    profile = trace(config, key)
    width = 2 if key.regime is Regime.COMPUTE else 4
    real = allocator_peak(lambda: train(config, key))
    model = build(config, attention=ATTENTION_NAME, experts=EXPERTS_NAME)
    parameters = sum(p.numel() for p in model.parameters()) + _added(key, family)
    traced = traced_peak(profile, width) + width * parameters
    # The CPU multiplies different types through a copy in the wider one; a GPU does not, so the
    # trace does not. It shows where experts' bf16 outputs meet their fp32 router's weights.
    cpu_copies = key.checkpointing is not Checkpointing.NONE and family in ("mixtral", "gpt_oss")
    assert traced == pytest.approx(real, rel=0.03 if cpu_copies else TOLERANCE)


def _added(key, family):
    spec = model_from_config(family, CONFIGS[family])
    return spec.num_adapter_parameters(key.adapter) if key.adapter else 0


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(f, marks=pytest.mark.slow) for f in ("qwen2", "mistral"))]
)
def test_the_mask_recipe_is_what_transformers_does(family):
    """Its own SDPA under a padding mask of ones keeps what the trace of SDPA keeps."""
    config = CONFIGS.get(family) or load_model("tiny-llama").hf_config
    spec = model_from_config(family, config)
    model = build(config, attention="sdpa", experts=EXPERTS_NAME, dtype=torch.bfloat16).train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seq = WINDOW - 4 if spec.num_window_layers else SEQ
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    ids = torch.randint(0, 500, (BATCH, seq))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    profile = trace(config, replace(KEY, attention=Attention.SDPA))
    layers = [profile.kinds[i].forward for i in profile.layers]
    traced = sum(at(layer.end, seq=seq) for layer in layers)
    tokens, hidden = BATCH * seq, spec.hidden_size
    # Kept outside the layers: the final norm and its output, the ids, one cosine and sine.
    outside = tokens * (hidden * 8 + 4 + 8) + seq * spec.head_dim * 4
    alive = tokens * hidden * 2  # the last layer's output, kept by nobody
    assert sum(size for size, _ in kept.values()) == pytest.approx(
        traced - alive + outside, rel=TOLERANCE
    )


AXES = {
    "regime": replace(KEY, regime=Regime.FSDP),
    "autocast": replace(KEY, regime=Regime.AUTOCAST),
    "packed": replace(KEY, packed=True),
    "exchanged": replace(KEY, exchanged=True),
    "eager": replace(KEY, attention=Attention.EAGER),
    "full": replace(KEY, checkpointing=Checkpointing.FULL),
    "reentrant": replace(KEY, checkpointing=Checkpointing.REENTRANT),
    "selective": replace(KEY, checkpointing=Checkpointing.SELECTIVE),
    "transformers": replace(KEY, loss=Loss.TRANSFORMERS),
    "chunked": replace(KEY, loss=Loss.CHUNKED),
    "fused_linear": replace(KEY, loss=Loss.FUSED_LINEAR),
    "fused_kernels": replace(KEY, fused_kernels=True),
    "adapter": replace(KEY, adapter=LORA),
}


@pytest.mark.slow
def test_every_axis_of_a_key_moves_the_profile():
    config = load_model("tiny-llama").hf_config
    keys = {"plain": KEY} | AXES | {"single": replace(KEY, exchanged=True, single=True)}
    keys |= {"flash": replace(KEY, packed=True, attention=Attention.FLASH)}
    profiles = dict(zip(keys, trace_profiles(config, list(keys.values())), strict=True))
    peaks = {name: traced_peak(p, 0) for name, p in profiles.items()}
    kept = {name: at(p.kinds[-1].forward.end) for name, p in profiles.items()}
    # A kernel that knows lengths needs no mask for packed batches.
    assert peaks["flash"] == pytest.approx(peaks["plain"], rel=0.01)
    assert kept["selective"] < kept["plain"] < kept["packed"] < kept["eager"]
    assert kept["full"] <= kept["reentrant"] < kept["selective"]
    assert kept["fused_kernels"] < kept["plain"] < kept["regime"] < kept["autocast"]
    assert kept["adapter"] < kept["plain"] < kept["exchanged"]
    assert peaks["single"] < peaks["exchanged"]
    assert peaks["fused_linear"] < peaks["chunked"] < peaks["plain"] == peaks["transformers"]
    window = trace(CONFIGS["mistral"], KEY), trace(CONFIGS["mistral"], replace(KEY, windowed=True))
    assert traced_peak(window[0], 0) < traced_peak(window[1], 0)


RING = replace(KEY, attention=Attention.RING, exchanged=True)
RINGS = [RING, *(replace(RING, packed=True, gathered=wide) for wide in ((4, 2), (4, 4), (8, 4)))]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_ring_is_traced_without_its_ranks():
    """It saves what was counted by hand, however much it gathers."""
    model = load_model("tiny-qwen3")  # 4 key-value heads
    profiles = trace_profiles(model.hf_config, RINGS)
    for key, profile in zip(RINGS, profiles, strict=True):
        counted = closed_form_profile(model, key)
        assert profile.kinds[-1].forward.end == counted.kinds[-1].forward.end


@pytest.mark.slow
def test_layers_that_differ_are_told_apart():
    """Without a table a family: windows in every other layer, dense layers among experts."""
    key = replace(KEY, windowed=True)
    gemma = trace(CONFIGS["gemma3"], key)
    assert not {gemma.layers[0], gemma.layers[2]} & {gemma.layers[1], gemma.layers[3]}
    sparse = CONFIGS["qwen3_moe"] | {"mlp_only_layers": [1]}
    experts = trace(sparse, KEY)
    assert experts.layers[1] not in {experts.layers[i] for i in (0, 2, 3)}
    dense = experts.kinds[experts.layers[1]].parameter_elements
    spec = model_from_config("x", sparse)
    assert dense == spec.num_attention_parameters + spec.num_dense_ffn_parameters


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "change"),
    [("granite", {}), ("gpt2", {"n_embd": 128, "n_head": 8, "n_positions": 512}), ("cohere2", {})],
)
def test_a_family_nobody_has_listed(family, change):
    config = CONFIGS["olmo2"] | change | {"model_type": family, "architectures": None}
    profile = trace(config, KEY)
    with torch.device("meta"):
        parsed = transformers.AutoConfig.for_model(**config)
        model = transformers.AutoModelForCausalLM.from_config(parsed)
    counted = sum(phase.gradient_elements for phase in phases(profile))
    assert counted == sum(p.numel() for p in model.parameters())
    assert np.sum([phase.end for phase in phases(profile)], axis=0).tolist() == [0.0] * 6
    assert len(profile.layers) == parsed.num_hidden_layers


def test_a_cut_model_keeps_the_places_of_its_layers():
    config = load_model("gemma-3-1b").hf_config
    cut = build_cut(config, dtype=torch.bfloat16, attention=ATTENTION_NAME, adapter=None)
    # Five windows, then one layer of the whole sequence; 26 layers.
    assert cut.chosen == (0, 5, 23, 25)
    assert [layer.self_attn.layer_idx for layer in cut.layers] == [0, 1, 2, 3]
    assert cut.model.config.layer_types == [
        "sliding_attention", "full_attention", "full_attention", "sliding_attention",
    ]  # fmt: skip
    assert cut.copies == [1, 1, 3, 21]


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "nonsense"},
        {"rope_parameters": {"rope_type": "nowhere"}},
        {"num_attention_heads": "four"},
        {"model_type": "unheard_of"},
    ],
)
def test_a_config_transformers_cannot_build(change):
    config = load_model("tiny-llama").hf_config | change
    with pytest.raises(AutotuneError, match="cannot build the model of this config") as caught:
        trace_profiles(config, [KEY])
    assert "\n" not in str(caught.value)


def test_the_child_hands_an_error_on(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOTUNE_CACHE_DIR", str(tmp_path))
    file = tmp_path / "config.json"
    file.write_text(json.dumps(load_model("tiny-llama").hf_config | {"hidden_act": "nonsense"}))
    with pytest.raises(AutotuneError, match=r"cannot build.*nonsense"):
        activation_profile(load_model(str(file)), KEY)


@pytest.mark.slow
def test_the_child_answers_as_this_process_does():
    config = CONFIGS["qwen2"]
    keys = [replace(KEY, packed=True), replace(KEY, regime=Regime.FSDP)]
    answered = [profile_from_json(data) for data in trace_in_child(config, keys)]
    assert answered == trace_profiles(config, keys)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-qwen3", "qwen3-8b"])
def test_what_is_shipped_is_what_is_traced(name):
    """With the libraries it was traced with; others may allocate otherwise."""
    model = load_model(name)
    keys = [
        replace(KEY, packed=True),
        TraceKey(regime=Regime.FSDP, packed=True, checkpointing=Checkpointing.FULL),
        TraceKey(regime=Regime.AUTOCAST, packed=True, exchanged=True),
    ]
    for key, traced in zip(keys, trace_profiles(model.hf_config, keys), strict=True):
        shipped = activation_profile(model, key)
        if shipped.versions != traced.versions:
            pytest.skip(f"shipped with {dict(shipped.versions)}")
        assert shipped == traced
