"""Families without a table: counted in the model itself, estimated, held against real runs."""

import json

import pytest

from autotune.errors import AutotuneError
from autotune.memory import estimate_memory
from autotune.memory.profile_json import profile_to_json
from autotune.memory.setup import Regime, TraceKey
from autotune.memory.sizes import sizes_of
from autotune.plan import Engine, Plan
from autotune.spec.hardware import load_hardware
from autotune.spec.model import any_family, load_model
from autotune.spec.workload import Lora, Workload
from tests.integration.allocator import allocator_peak
from tests.integration.commands import autotune
from tests.integration.other_families import OTHER_FAMILIES, config_of

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]

from autotune.memory import profiles  # noqa: E402
from autotune.runner import ulysses  # noqa: E402
from autotune.runner.experts import EXPERTS_NAME  # noqa: E402
from autotune.runner.loss import token_weighted_loss  # noqa: E402
from autotune.runner.trace.describe import describe  # noqa: E402
from autotune.runner.trace.profiles import trace_profiles  # noqa: E402
from autotune.runner.ulysses import ATTENTION_NAME  # noqa: E402

BATCH, SEQ = 2, 192
SLOW = pytest.mark.slow
MEASURED = ("olmoe", pytest.param("granite", marks=SLOW), pytest.param("gpt_neox", marks=SLOW))
TOLERANCE = 0.01


@pytest.fixture
def here(monkeypatch, tmp_path):
    """Count and trace in this process, which has the libraries loaded."""
    monkeypatch.setenv("AUTOTUNE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(any_family, "_count", lambda name, config: describe(config))

    def trace(config, keys):
        return [profile_to_json(profile) for profile in trace_profiles(config, keys)]

    monkeypatch.setattr(profiles, "_trace_in_children", trace)


def read(family):
    return any_family.model_of_any_family(family, config_of(family))


def build(family, **how):
    config = transformers.AutoConfig.for_model(**config_of(family))
    return transformers.AutoModelForCausalLM.from_config(config, **how)


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_parameters_are_those_of_the_model(here, family):
    spec = read(family)
    with torch.device("meta"):
        model = build(family)
    assert spec.num_parameters == sum(p.numel() for p in model.parameters())
    assert spec.num_embedding_parameters == model.get_input_embeddings().weight.numel()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert spec.tied_embeddings == tied
    assert spec.num_layers == model.config.num_hidden_layers
    assert spec.num_heads == model.config.num_attention_heads
    counted = spec.counted
    assert sum(size * count for size, count in counted.sizes.items()) == sum(counted.layers)
    assert sum(counted.layers) + spec.num_root_parameters == spec.num_parameters
    assert (spec.moe is None) == (spec.num_active_parameters == spec.num_parameters)


# PEFT warns of weights that lie transposed, of names that this family has not, and reads a name
# that transformers renamed.
@pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out", "ignore:The following .*_pattern", "ignore:.*gradient_checkpointing"
)
@pytest.mark.parametrize("family", [pytest.param("gpt2", marks=SLOW), "deepseek_v3"])
def test_an_adapter_adds_what_peft_adds(here, family):
    peft = pytest.importorskip("peft")
    spec = read(family)
    lora = Lora(r=4, target_modules=tuple(spec.linears))
    with torch.device("meta"):
        model = build(family)
    config = peft.LoraConfig(r=4, target_modules=list(spec.linears), task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, config)
    trained = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert spec.num_adapter_parameters(lora) == trained


def test_active_experts_are_counted(here):
    """OLMoE: of 8 experts with 3 products of 256 by 192 a token goes to 2, in 4 layers."""
    spec = read("olmoe")
    assert spec.num_parameters - spec.num_active_parameters == 4 * 6 * 3 * 256 * 192
    assert (spec.moe.num_experts, spec.moe.experts_per_token) == (8, 2)
    assert spec.moe.expert_ffn_size == 192


def train(family, workload):
    model = build(
        family,
        dtype=torch.float32,
        attn_implementation=ATTENTION_NAME,
        experts_implementation=EXPERTS_NAME,
    )
    model.train()
    model.config.use_cache = False
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    ids = torch.randint(0, 500, (BATCH, SEQ))
    labels = torch.randint(0, 500, (BATCH, SEQ))
    positions = torch.arange(SEQ).repeat(BATCH, 1)

    def loss():
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        return token_weighted_loss(logits, labels, torch.ones((), dtype=torch.long), 1)

    for _ in range(2):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("family", MEASURED)
def test_peak_of_a_real_process(here, monkeypatch, family):
    spec = read(family)
    workload = Workload(seq_len=SEQ, global_batch_size=BATCH, precision="fp32", packing=False)
    plan = Plan(strategy="ddp", engine=Engine.DDP, micro_batch_size=BATCH)
    found = estimate_memory(spec, workload, plan, load_hardware("cpu", 1))
    monkeypatch.setattr(ulysses, "CONTEXT", ulysses.AttentionContext())
    real = allocator_peak(lambda: train(family, workload))
    # This process has no group, so nothing wraps the model.
    predicted = found.allocator_bytes - found.components["buckets"]
    assert predicted == pytest.approx(real, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "bert"}, "is an encoder"),
        ({"model_type": "vit"}, "no model of model_type 'vit' that predicts the next token"),
        ({"model_type": "unheard_of"}, "knows no model_type 'unheard_of'"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "x.Y"}}, "auto_map.*is never run"),
        ({"model_type": "falcon"}, "computes attention by itself"),
        ({"model_type": "mamba"}, "no number of attention heads"),
        (config_of("granite") | {"num_attention_heads": "four"}, "cannot build the model"),
        (config_of("granite") | {"hidden_act": "nonsense"}, "cannot build the model.*nonsense"),
    ],
)
def test_what_is_no_decoder_is_refused(config, said):
    small = {"hidden_size": 96, "num_hidden_layers": 1, "vocab_size": 128}
    with pytest.raises(AutotuneError, match=said) as caught:
        describe(small | config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["bloom"])
def test_attention_of_its_own_is_refused_by_the_trace(family):
    config = {"model_type": family, "vocab_size": 256, "hidden_size": 64, "n_layer": 2, "n_head": 4}
    with pytest.raises(AutotuneError, match="computes attention by itself"):
        trace_profiles(config, [TraceKey(regime=Regime.COMPUTE)])


# peft sets it itself for Conv1D, which GPT-2 has.
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.slow
@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_trace_and_count_agree(here, family):
    spec = read(family)
    for adapter in (None, Lora(target_modules=tuple(spec.linears))):
        key = TraceKey(regime=Regime.COMPUTE, packed=True, adapter=adapter)
        size = sizes_of(spec, profiles.activation_profile(spec, key), adapter)
        added = spec.num_adapter_parameters(adapter) if adapter else 0
        assert size.total == spec.num_parameters + added
        assert size.trainable == (added or spec.num_parameters)
        trained = sum(a * b for a, b in zip(size.parameters, size.counts, strict=True))
        assert trained == size.layers_trainable.sum()


def estimate(folder, config, *flags):
    (folder / "config.json").write_text(json.dumps(config))
    file = folder / "run.yml"
    file.write_text(
        "base_model: ./config.json\nsequence_len: 512\nmicro_batch_size: 1\nlearning_rate: 1.0e-4\n"
    )
    return autotune("estimate", str(file), "--gpus", "2", "--gpu-type", "a100-80gb", *flags)


@pytest.mark.parametrize("family", [pytest.param(f, marks=SLOW) for f in OTHER_FAMILIES])
def test_estimate_prints(monkeypatch, tmp_path, family):
    monkeypatch.setenv("AUTOTUNE_CACHE_DIR", str(tmp_path / "cache"))
    done = estimate(tmp_path, config_of(family), "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    memory = document["memory"]
    spec = load_model(str(tmp_path / "config.json"), any_family=True)  # from the cache
    assert memory["components"]["parameters"] == 4 * spec.num_parameters
    assert memory["total_bytes"] > 16 * spec.num_parameters
    assert document["time"]["step_s"] > 0


def test_search_and_train_say_what_works(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_of("granite")))
    hardware = ("--gpus", "2", "--device", "cpu", "--out", str(tmp_path / "study"))
    done = autotune("search", "--model", str(tmp_path), *hardware)
    assert done.returncode == 2
    assert "'autotune plan', 'estimate' and 'capacity' take any decoder" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
