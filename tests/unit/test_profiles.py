"""Where profiles come from, and their JSON."""

import gzip
import json
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import autotune.memory
from autotune.errors import AutotuneError
from autotune.memory import profiles as found_by
from autotune.memory.closed_form import closed_form_profile
from autotune.memory.polynomials import fit, points
from autotune.memory.profile import features
from autotune.memory.profile_json import (
    key_from_json,
    key_text,
    key_to_json,
    profile_from_json,
    profile_to_json,
)
from autotune.memory.profiles import TRACER_VERSION, TraceFailure, activation_profile, config_digest
from autotune.memory.setup import (
    Attention,
    Checkpointing,
    Float8,
    Loss,
    Regime,
    TraceKey,
    setup_of,
)
from autotune.plan import Engine, Plan
from autotune.spec.catalogue import read_catalogue
from autotune.spec.hardware import load_hardware
from autotune.spec.model import load_model, model_from_config
from autotune.spec.workload import Lora, Workload

KEY = TraceKey(regime=Regime.COMPUTE, packed=True)
SHIPPED = Path(autotune.memory.__file__).parent / "shipped"


@pytest.fixture(autouse=True)
def nothing_found_before(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOTUNE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("AUTOTUNE_TRACE", raising=False)
    monkeypatch.setattr(found_by, "_found", {})


@pytest.fixture
def own_model():
    """A model nobody ships."""
    config = load_model("tiny-llama").hf_config | {"intermediate_size": 512}
    return model_from_config("own", config)


@pytest.fixture
def without_stack(monkeypatch):
    monkeypatch.setattr(found_by, "can_trace", lambda: False)


def level_after(profile, sizes):
    """Bytes left by a whole micro-step, and by its forward alone."""
    layers = [profile.kinds[i] for i in profile.layers]
    forward = [profile.embedding_forward, *(kind.forward for kind in layers)]
    forward += [profile.head_forward, profile.loss_forward]
    back = [profile.loss_backward, profile.head_backward]
    back += [*(kind.backward for kind in layers), profile.embedding_backward]
    rows = [np.sum([phase.end for phase in phases], axis=0) for phases in (forward, back)]
    return features(*sizes) @ (rows[0] + rows[1]), features(*sizes) @ rows[0]


@pytest.mark.parametrize(
    "key",
    [
        KEY,
        TraceKey(
            regime=Regime.FSDP,
            exchanged=True,
            single=True,
            windowed=True,
            attention=Attention.FLASH,
            checkpointing=Checkpointing.SELECTIVE,
            loss=Loss.FUSED_LINEAR,
            fused_kernels=True,
            adapter=Lora(r=4, target_modules=("v_proj", "q_proj")),
        ),
        replace(KEY, float8=Float8.EMULATED),
    ],
)
def test_keys_go_through_json(key):
    again = key_from_json(json.loads(json.dumps(key_to_json(key))))
    assert key_text(again) == key_text(key)
    assert replace(again, adapter=None) == replace(key, adapter=None)


def test_projections_in_fp8_are_traced_alone():
    """What ships knows no such key, and the closed form does not know their casts."""
    asked = replace(KEY, float8=Float8.HARDWARE)
    assert len({key_text(key) for key in (KEY, asked, replace(KEY, float8=Float8.EMULATED))}) == 3
    with pytest.raises(AutotuneError, match=r"fp8 has to be traced"):
        closed_form_profile(load_model("tiny-qwen3"), asked)


def test_keys_that_allocate_alike_are_one():
    lora = Lora(r=4, target_modules=("q_proj", "v_proj"))
    scaled = lora.model_copy(update={"alpha": 99, "target_modules": ("v_proj", "q_proj")})
    keys = [replace(KEY, adapter=adapter) for adapter in (lora, scaled, Lora(r=8))]
    assert key_text(keys[0]) == key_text(keys[1]) != key_text(keys[2])
    # PEFT passes over names the model has not.
    model, asked = load_model("mixtral-8x7b"), replace(KEY, adapter=Lora())
    own = replace(KEY, adapter=Lora(target_modules=tuple(model.linears)))
    assert found_by._with_own_targets(model, asked) == own != asked
    dropping = replace(KEY, adapter=lora.model_copy(update={"dropout": 0.1}))
    assert key_text(dropping) != key_text(keys[0])


def test_profiles_go_through_json():
    profile = closed_form_profile(load_model("tiny-qwen3"), KEY)
    assert profile_from_json(json.loads(json.dumps(profile_to_json(profile)))) == profile


@pytest.mark.parametrize(
    "change",
    [
        {"format": 99},
        {"layers": [7]},
        {"layers": []},
        {"head_forward": {"end": [1, 2], "gradients": 0, "peaks": []}},
        {"kinds": None},
        {"evaluation": "x"},
    ],
)
def test_what_is_no_profile(change):
    data = profile_to_json(closed_form_profile(load_model("tiny-qwen3"), KEY))
    with pytest.raises(AutotuneError, match="profile"):
        profile_from_json(data | change)


def test_what_is_shipped_is_read_without_the_stack(without_stack):
    shipped = sorted(SHIPPED.glob("*.json.gz"))
    assert {file.name.removesuffix(".json.gz") for file in shipped} >= {"tiny-qwen3", "qwen3-8b"}
    for file in shipped:
        name = file.name.removesuffix(".json.gz")
        model = load_model(name)
        data = json.loads(gzip.decompress(file.read_bytes()))
        assert name in read_catalogue("models")
        assert (data["digest"], data["tracer"]) == (config_digest(model.hf_config), TRACER_VERSION)
        profile = activation_profile(model, KEY if model.sliding_window is None else _any(data))
        assert profile.source == "traced"
        assert len(profile.layers) == model.num_layers
        trained = sum(profile.kinds[i].trainable_elements for i in profile.layers)
        assert trained == model.num_parameters - model.num_root_parameters


def _any(data):
    key = next(key for key in map(json.loads, data["keys"]) if not key["adapter"])
    return key_from_json(key)


def test_a_shipped_profile_is_of_one_config(without_stack):
    """Another model of the same name is not taken for it."""
    other = load_model("tiny-qwen3").hf_config | {"intermediate_size": 512}
    assert activation_profile(model_from_config("tiny-qwen3", other), KEY).source == "closed form"


def test_the_digest_leaves_out_what_names_files():
    config = load_model("tiny-qwen3").hf_config
    assert config_digest(config | {"transformers_version": "9", "dtype": "float32"}) == (
        config_digest(config)
    )
    assert config_digest(config | {"vocab_size": 1}) != config_digest(config)


def test_traced_once_then_cached(own_model, monkeypatch):
    asked = []
    profile = profile_to_json(closed_form_profile(own_model, KEY)) | {"source": "traced"}

    def trace(config, keys):
        asked.extend(keys)
        return [profile for _ in keys]

    monkeypatch.setattr(found_by, "can_trace", lambda: True)
    monkeypatch.setattr(found_by, "trace_in_child", trace)
    first = activation_profile(own_model, KEY)
    found_by._found.clear()
    assert activation_profile(own_model, KEY) == first
    assert asked == [KEY]
    found_by._found.clear()
    monkeypatch.setattr(found_by, "stack_versions", lambda: ("another torch",))
    activation_profile(own_model, KEY)
    assert asked == [KEY, KEY]


def test_a_corrupt_cache_is_set_aside(own_model, without_stack, caplog):
    file = found_by._cache_file(config_digest(own_model.hf_config), KEY)
    file.parent.mkdir(parents=True)
    file.write_text('{"format": 1, "kinds": [')
    with caplog.at_level(logging.WARNING):
        profile = activation_profile(own_model, KEY)
    assert profile.source == "closed form"
    assert "set aside" in caplog.text
    assert not file.exists()
    assert file.with_suffix(".corrupt").read_text().startswith('{"format"')


def test_a_trace_that_went_wrong_leaves_the_closed_form(own_model, monkeypatch, caplog):
    def fail(config, keys):
        raise TraceFailure("Tracing failed (boom).")

    monkeypatch.setattr(found_by, "can_trace", lambda: True)
    monkeypatch.setattr(found_by, "trace_in_child", fail)
    assert activation_profile(own_model, KEY).source == "closed form"
    assert "boom" in caplog.text


def test_the_stack_is_never_imported(tmp_path):
    code = (
        "import sys\n"
        "from autotune.memory.profiles import activation_profile\n"
        "from autotune.memory.setup import Regime, TraceKey\n"
        "from autotune.spec.model import load_model\n"
        "activation_profile(load_model('tiny-qwen3'), TraceKey(regime=Regime.FSDP, packed=True))\n"
        "assert not {'torch', 'transformers', 'pandas'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("checkpointing", [Checkpointing.NONE, Checkpointing.FULL])
@pytest.mark.parametrize("regime", Regime)
@pytest.mark.parametrize("name", ["tiny-llama", "qwen3-0.6b", "gpt-oss-20b", "phi-4-mini"])
def test_the_closed_form_frees_all_but_masks(name, regime, checkpointing):
    model = load_model(name)
    windowed = model.sliding_window is not None and model.sliding_window < 4096
    key = TraceKey(regime=regime, packed=True, windowed=windowed, checkpointing=checkpointing)
    left, kept = level_after(closed_form_profile(model, key), (2, 4096, 1))
    masks = (1 + windowed * (1 + model.sinks)) * 2 * 4097**2
    assert 0 <= left <= masks
    assert kept > 3 * left


@pytest.mark.parametrize(
    "change",
    [{"attention": Attention.EAGER}, {"loss": Loss.CHUNKED}, {"fused_kernels": True}],
)
def test_the_closed_form_knows_this_project_alone(change):
    with pytest.raises(AutotuneError, match=r"install autotune-llm\[train\]"):
        closed_form_profile(load_model("tiny-llama"), replace(KEY, **change))


def test_a_fit_that_does_not_hold_is_refused():
    sizes = points(64, 64, (1, 2, 3), squares=True)
    batch, length = np.array(sizes, float).T
    exact = 5 + 3 * batch * length + 2 * batch * length**2
    assert fit(sizes, exact[:, None], 1)[0].tolist() == pytest.approx([5, 0, 0, 3, 0, 2])
    with pytest.raises(ValueError, match="no polynomial"):
        fit(sizes, (length**3)[:, None], 1)
    linear = points(64, 64, (1, 2, 3), squares=False)
    with pytest.raises(ValueError, match="no polynomial"):
        fit(linear, np.array([[b * s**2] for b, s in linear], float), 1)


def test_one_exchanged_sequence_has_a_key_of_its_own():
    model, workload = load_model("tiny-qwen3"), Workload()
    keys = [
        setup_of(
            model,
            workload,
            Plan(strategy="x", engine=Engine.DDP, micro_batch_size=b, cp=cp),
            load_hardware("h100-sxm", 2),
        ).key
        for b, cp in ((1, 1), (1, 2), (2, 2))
    ]
    assert [key.single for key in keys] == [False, True, False]
