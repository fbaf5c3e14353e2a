"""Windows, sinks and experts here against transformers' own eager code: logits and gradients."""

import pytest

from autotune.memory.layers import LayerInventory
from autotune.plan import Engine, Plan
from autotune.spec.model import model_from_config
from autotune.spec.workload import Workload

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]

from autotune.runner.attention import WindowMasks, add_sink  # noqa: E402
from autotune.runner.experts import EXPERTS_NAME, register_experts  # noqa: E402
from autotune.runner.ulysses import (  # noqa: E402
    ATTENTION_NAME,
    CONTEXT,
    document_mask,
    register_attention,
)
from tests.integration.families import CONFIGS, WINDOW, build  # noqa: E402

BATCH, SEQ, FIRST = 2, 48, 30
LENGTHS = {"plain": [SEQ], "packed": [FIRST, SEQ - FIRST]}


@pytest.fixture(autouse=True)
def clean():
    register_attention()
    register_experts()
    yield
    CONTEXT.mask, CONTEXT.windows = None, WindowMasks()


def documents(kind):
    ids = [i for i, length in enumerate(LENGTHS[kind]) for _ in range(length)]
    positions = [p for length in LENGTHS[kind] for p in range(length)]
    return (torch.tensor(values).expand(BATCH, SEQ) for values in (ids, positions))


def eager_masks(model, ids):
    """Additive masks written down from the definition, so transformers guesses nothing."""
    distance = torch.arange(SEQ)[:, None] - torch.arange(SEQ)[None, :]
    same = ids[:, None, :, None] == ids[:, None, None, :]

    def additive(window):
        seen = same & (distance >= 0) & (distance < window)
        return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)

    by_type = {"full_attention": additive(SEQ), "sliding_attention": additive(WINDOW)}
    if getattr(model.config, "layer_types", None):
        return by_type
    windowed = getattr(model.config, "sliding_window", None)
    return by_type["sliding_attention" if windowed else "full_attention"]


@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize("family", CONFIGS)
def test_logits_and_gradients(family, kind):
    config = CONFIGS[family]
    ours = build(config, attention=ATTENTION_NAME, experts=EXPERTS_NAME)
    eager = build(config, attention="eager", experts="eager")
    for parameter in ours.parameters():
        if parameter.dim() == 1:  # norms, biases, sinks: all at 0 or 1 would hide mistakes
            torch.nn.init.normal_(parameter, std=0.5)
    eager.load_state_dict(ours.state_dict())
    ids, positions = documents(kind)
    tokens = torch.randint(0, 512, (BATCH, SEQ))
    inputs = {"input_ids": tokens, "position_ids": positions, "use_cache": False}
    CONTEXT.mask = document_mask(ids) if kind == "packed" else None
    mine = ours(**inputs).logits
    theirs = eager(**inputs, attention_mask=eager_masks(eager, ids)).logits
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-6)
    weights = torch.randn_like(mine)
    (mine * weights).sum().backward()
    (theirs * weights).sum().backward()
    for (name, p), q in zip(ours.named_parameters(), eager.parameters(), strict=True):
        scale = float(q.grad.abs().max())
        assert scale > 0, name
        worst = float((p.grad - q.grad).abs().max())
        assert worst <= 2e-4 * scale, name


@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize("family", ["gemma3", "gpt_oss", "mistral", "mixtral"])
def test_masks_kept_in_memory(family, kind):
    config = CONFIGS[family]
    model = build(config, attention=ATTENTION_NAME, experts=EXPERTS_NAME)
    ids, positions = documents(kind)
    CONTEXT.mask = document_mask(ids) if kind == "packed" else None
    CONTEXT.calls = CONTEXT.masked_calls = 0
    model(input_ids=torch.zeros(BATCH, SEQ, dtype=torch.long), position_ids=positions)
    spec = model_from_config(family, config)
    masked = 4 if kind == "packed" else spec.num_window_layers
    assert (CONTEXT.calls, CONTEXT.masked_calls) == (4, masked)
    workload = Workload(seq_len=SEQ, packing=kind == "packed")
    plan = Plan(strategy="x", engine=Engine.DDP, micro_batch_size=BATCH)
    held = [CONTEXT.mask] if kind == "packed" else []
    held += CONTEXT.windows._made.values()
    assert sum(m.nbytes for m in held) == LayerInventory(spec, workload, plan).masks()


def test_a_window_over_the_whole_sequence_needs_no_mask():
    masks = WindowMasks()
    options = {"seq_len": 8, "sink": False, "device": torch.device("cpu")}
    assert masks.mask(None, window=8, **options) is None
    assert masks.mask(None, window=7, **options).sum() == 8 * 9 // 2 - 1


def test_sinks_keep_small_features_exact_in_bf16():
    query, key = torch.ones(1, 2, 3, 8), torch.ones(1, 1, 3, 8)
    sinks = torch.tensor([0.5, -3.0])
    q, k, _ = add_sink(query.bfloat16(), key.bfloat16(), key.bfloat16(), sinks, 8**-0.5)
    scores = (q.float() @ k.float().transpose(2, 3)) * 8**-0.5
    assert q.shape[-1] % 8 == 0
    torch.testing.assert_close(scores[0, :, 1:, 0], sinks[:, None].expand(2, 3), rtol=4e-3, atol=0)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_follow_autocast(family):
    """Otherwise DDP alone would compute its experts in fp32."""
    model = build(CONFIGS[family], attention=ATTENTION_NAME, experts=EXPERTS_NAME)
    experts = model.model.layers[0].mlp.experts
    hidden = torch.randn(6, 128, requires_grad=True)
    chosen = torch.tensor([[0, 3], [1, 3], [7, 0], [2, 5], [4, 6], [3, 1]])
    weights = torch.rand(6, 2)
    exact = experts(hidden, chosen, weights)
    with torch.autocast("cpu", torch.bfloat16):
        output = experts(hidden, chosen, weights)
    assert (exact.dtype, output.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(
        output.float(), exact, rtol=0.05, atol=0.02 * float(exact.detach().std())
    )
    output.float().sum().backward()
    assert experts.down_proj.grad.dtype == hidden.grad.dtype == torch.float32
    assert all(bool(g.any()) for g in experts.down_proj.grad)
