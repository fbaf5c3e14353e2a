"""The chunked loss, the check of 4-bit layers and that of Liger's kernels, on one small model."""

from types import SimpleNamespace

import pytest

from autotune.errors import AutotuneError
from autotune.spec.workload import BaseStorage, LigerKernel, Lora, Precision
from tests.integration.allocator import allocator_peak
from tests.integration.ranks import small_config

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.integration,
    pytest.mark.usefixtures("one_thread"),
]

from autotune.runner.liger import apply_liger, missing_kernels  # noqa: E402
from autotune.runner.loss import CHUNKS, token_weighted_loss  # noqa: E402
from autotune.runner.models import add_adapter  # noqa: E402
from autotune.runner.offloading import _is_parameter  # noqa: E402
from autotune.runner.quantised import (  # noqa: E402
    count_quantised,
    quantisation_config,
    quantise_linears,
)
from autotune.runner.trainer import AutotuneTrainer  # noqa: E402
from autotune.runner.training_checks import _whole_linears  # noqa: E402

TOKENS, VOCAB = 256, 2048


def small_model():
    config = transformers.AutoConfig.for_model(**small_config())
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def logits_and_labels(dtype):
    torch.manual_seed(0)
    logits = torch.randn(2, TOKENS // 2, VOCAB).mul_(4).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCAB, (2, TOKENS // 2))
    labels[0, :40] = -100
    return logits, labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_chunked_loss_is_the_plain_one(dtype):
    values, gradients = [], []
    for chunked in (False, True):
        logits, labels = logits_and_labels(dtype)
        loss = token_weighted_loss(logits, labels, (labels >= 0).sum(), 2, chunked=chunked)
        loss.backward()
        values.append(loss.item())
        gradients.append(logits.grad)
    assert values[1] == pytest.approx(values[0], rel=1e-6)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("tokens", [1, 5, 8, 9])
def test_fewer_tokens_than_chunks(tokens):
    logits, labels = torch.randn(1, tokens, 16), torch.randint(0, 16, (1, tokens))
    one = torch.ones(())
    plain = token_weighted_loss(logits, labels, one, 1)
    assert token_weighted_loss(logits, labels, one, 1, chunked=True).item() == pytest.approx(
        plain.item(), rel=1e-6
    )


def test_the_chunked_loss_needs_less_memory():
    """By the allocator: of fp32 copies of the logits one slice's are left, forward and back."""

    def peak(chunked):
        logits, labels = logits_and_labels(torch.bfloat16)
        step = torch.tensor(TOKENS)
        return allocator_peak(
            lambda: token_weighted_loss(logits, labels, step, 1, chunked=chunked).backward()
        )

    plain, chunked = peak(False), peak(True)
    fp32 = 4 * TOKENS * VOCAB
    print(f"plain {plain / fp32:.2f}, chunked {chunked / fp32:.2f} times the fp32 logits")
    gradient = fp32 / 2  # of the bf16 logits, which both must make
    assert chunked < gradient * 2.2 + 4 * fp32 / CHUNKS < plain


def test_evaluation_of_a_chunked_run_holds_no_fp32_logits_either():
    """Else a run would train, and run out of memory at its first held-out loss."""
    logits, labels = logits_and_labels(torch.bfloat16)
    batch = {"input_ids": labels, "position_ids": labels, "shift_labels": labels}
    model = SimpleNamespace(eval=lambda: None, train=lambda: None)
    quiet = SimpleNamespace(on_prediction_step=lambda *_: None, on_evaluate=lambda *_: None)

    def evaluated(chunked):
        """Return the metrics and the peak beside the logits."""
        trainer = SimpleNamespace(
            model_wrapped=model, args=SimpleNamespace(device="cpu"), _eval_loader=[batch],
            _prepare_inputs=lambda given: given, _forward=lambda *_: (logits.detach(), labels),
            callback_handler=quiet, state=SimpleNamespace(global_step=0), control=None,
            log=lambda metrics: None, _chunked=chunked, _fused_loss=False,
        )  # fmt: skip
        found = []
        peak = allocator_peak(lambda: found.append(AutotuneTrainer._held_out_loss(trainer, "eval")))
        return found[0], peak

    (plain, plain_peak), (chunked, chunked_peak) = evaluated(False), evaluated(True)
    assert chunked["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-6)
    assert chunked["eval_tokens"] == plain["eval_tokens"] == (labels >= 0).sum()
    fp32 = 4 * TOKENS * VOCAB
    assert chunked_peak < 4 * fp32 / CHUNKS < fp32 < plain_peak


def quantised(storage=BaseStorage.NF4_DOUBLE, precision=Precision.BF16):
    config = quantisation_config(storage, precision)
    return quantise_linears(small_model(), config, torch.device("cpu"))


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("storage", list(BaseStorage))
def test_every_projection_is_in_4_bits(storage, precision):
    model = quantised(storage, precision)
    assert count_quantised(model) == 14
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.quant_state.nested is (storage is BaseStorage.NF4_DOUBLE)
    assert weight.dtype is (torch.bfloat16 if precision is Precision.BF16 else torch.float32)
    adapted = add_adapter(model, Lora(r=4))
    assert count_quantised(adapted) == 14 and _whole_linears(adapted) == []


@pytest.mark.parametrize(
    ("more", "scale"), [({}, 8 / 4), ({"rslora": True}, 8 / 2), ({"dora": True}, 8 / 4)]
)
def test_an_adapter_is_the_one_asked_for(more, scale):
    """Runs are compared with a process that makes its adapter by the same code."""
    asked = Lora(r=4, alpha=8, dropout=0.25, target_modules=("q_proj", "up_proj"), **more)
    model = add_adapter(small_model(), asked)
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert {name.rpartition(".")[2] for name in layers} == {"q_proj", "up_proj"}
    assert len(layers) == 4
    for layer in layers.values():
        assert layer.scaling["default"] == scale  # alpha / r; of rsLoRA alpha / sqrt(r)
        assert layer.lora_dropout["default"].p == 0.25
        assert bool(len(layer.lora_magnitude_vector)) is asked.dora
        assert layer.lora_A["default"].weight.shape[0] == 4


def test_a_layer_that_stayed_whole_is_found():
    model = quantised()
    layer = model.model.layers[1].mlp
    layer.up_proj = torch.nn.Linear(64, 128)
    adapted = add_adapter(model, Lora(r=4))
    assert count_quantised(adapted) == 13
    assert ["up_proj" in name for name in _whole_linears(adapted)] == [True]


def test_a_4_bit_layer_with_a_whole_weight_is_found():
    model = quantised()
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = torch.nn.Parameter(torch.zeros(128, 64), requires_grad=False)
    with pytest.raises(AutotuneError, match=r"up_proj is to be in 4 bits, but holds 32 bits"):
        count_quantised(model)


def test_the_models_own_kernels_are_not_taken_for_liger_s():
    model = small_model()
    assert missing_kernels(model, list(LigerKernel)) == list(LigerKernel)
    assert missing_kernels(add_adapter(model, Lora(r=4)), list(LigerKernel)) == list(LigerKernel)
    apply_liger(model, ())


@pytest.mark.parametrize(
    "asked",
    [
        (LigerKernel.RMS_NORM,),
        (LigerKernel.GLU_ACTIVATION, LigerKernel.FUSED_LINEAR_CROSS_ENTROPY),
        tuple(LigerKernel),
    ],
    ids=len,
)
def test_liger_s_kernels_are_found_where_they_were_put(asked, monkeypatch):
    pytest.importorskip("triton", reason="liger-kernel needs Triton to be imported")
    pytest.importorskip("liger_kernel")
    from transformers.models.qwen3 import modeling_qwen3

    for name in ("apply_rotary_pos_emb", "Qwen3RMSNorm", "Qwen3MLP"):
        monkeypatch.setattr(modeling_qwen3, name, getattr(modeling_qwen3, name))
    model = add_adapter(small_model(), Lora(r=4))
    apply_liger(model, asked)
    assert missing_kernels(model, asked) == []
    others = [kernel for kernel in LigerKernel if kernel not in asked]
    assert missing_kernels(model, others) == others


def test_liger_without_triton_is_one_clear_message():
    try:
        import triton  # noqa: F401
    except ImportError:
        with pytest.raises(AutotuneError, match="need liger-kernel and Triton"):
            apply_liger(small_model(), [LigerKernel.ROPE])
    else:
        pytest.skip("Triton is here")


def test_parameters_and_their_views_stay_on_the_device():
    weight = torch.nn.Parameter(torch.zeros(4, 4))
    assert _is_parameter(weight) and _is_parameter(weight.detach().requires_grad_()) is False
    assert _is_parameter(weight.t()) and not _is_parameter(weight * 2)
