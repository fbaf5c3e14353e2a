"""Adapters, a base in 4 bits, 8-bit optimizers and the chunked loss on real ranks.

Against one process in fp32 under SGD, without clipping: loss to 1e-5 at every step.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from autotune.spec.workload import BaseStorage, Lora, Precision, Workload
from tests.integration.ranks import (
    logged,
    make_plan,
    run_well,
    small_config,
    training_request,
)

pytestmark = pytest.mark.integration

STEPS = 3
LORA = Lora(r=4, alpha=8)
KINDS = {
    "rslora": LORA.model_copy(update={"rslora": True}),
    "dora": LORA.model_copy(update={"dora": True}),
    "nf4": LORA.model_copy(update={"base_storage": BaseStorage.NF4_DOUBLE, "rslora": True}),
    "nf4-dora": LORA.model_copy(update={"base_storage": BaseStorage.NF4, "dora": True}),
}
CASES = [
    ("fsdp2", "nf4", True),
    ("zero3", "nf4", False),
    ("zero3", "dora", False),
    ("fsdp2", "dora", False),
    ("fsdp2", "nf4-dora", False),
    ("zero2", "nf4-dora", True),
    ("zero2", "dora", False),
    ("ddp", "nf4", True),
    ("zero2", "rslora", False),
    ("fsdp2", "rslora", False),
    ("zero3", "rslora", False),
    ("fsdp2_no_reshard", "nf4", False),
]  # (strategy, adapter, chunked loss)
QUICK = [("fsdp2", "nf4", True)]
# arXiv:2305.14314, appendix E: the sixteen values of NF4, of blocks scaled to [-1, 1].
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
BLOCK = 64


def train(
    folder: Path, corpus: Path, weights: Path, plan, *, learning_rate: float = 1.0, **workload
):
    """Return the losses of each step and what the ranks found to run."""
    values = {"seq_len": 64, "global_batch_size": 8, "precision": "fp32", "optimizer": "sgd"}
    request = training_request(
        plan,
        folder,
        data=corpus,
        workload=Workload(**(values | workload)),
        weights=weights,
        max_steps=STEPS,
        # Evaluation comes first, so that what it changes in the weights would show.
        val_set_size=4,
        learning_rate=learning_rate,
        max_grad_norm=0.0,
        save_final_weights=False,
    )
    ended = run_well(request)
    return logged(folder, "loss"), ended.results[0].asserted


@pytest.fixture(scope="session")
def reference(tmp_path_factory, corpus, initial_state):
    """Losses of one process with the plain loss, by adapter; run when first asked for."""
    known: dict[str, list[float]] = {}

    def get(kind: str) -> list[float]:
        if kind not in known:
            plan = make_plan("ddp", 1, micro_batch_size=8)
            folder = tmp_path_factory.mktemp("one-process")
            known[kind] = train(folder, corpus, initial_state, plan, adapter=KINDS[kind])[0]
        return known[kind]

    return get


@pytest.mark.parametrize(
    ("strategy", "kind", "chunked"),
    [
        pytest.param(*case, id="-".join(case[:2]), marks=[pytest.mark.slow] * (case not in QUICK))
        for case in CASES
    ],
)
def test_one_process_and_ranks_agree(
    strategy, kind, chunked, reference, tmp_path, corpus, initial_state
) -> None:
    want = reference(kind)
    plan = make_plan(strategy, 2, micro_batch_size=2, grad_accum_steps=2)
    loss, asserted = train(
        tmp_path, corpus, initial_state, plan, adapter=KINDS[kind], chunked_loss=chunked
    )
    assert loss == pytest.approx(want, abs=1e-5)
    assert want[-1] < want[0] - 0.01, "the reference must learn, or nothing is compared"
    assert asserted.get("layers_in_4bit") == (14 if "nf4" in kind else None)


def made_model():
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    config = AutoConfig.for_model(**small_config())
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("storage", [BaseStorage.NF4, BaseStorage.NF4_DOUBLE])
def test_the_4_bits_are_those_of_the_paper(storage) -> None:
    """Ranks are compared with a process that quantises by the same code: here is none of it."""
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes").functional
    from autotune.runner.quantised import quantisation_config, quantise_linears

    model = made_model()
    layers = [name for name, module in model.named_modules() if name.endswith("_proj")]
    whole = {name: model.get_submodule(name).weight.detach().clone() for name in layers}
    config = quantisation_config(storage, Precision.FP32)
    model = quantise_linears(model, config, torch.device("cpu"))
    values = torch.tensor(NF4_VALUES)
    for name in layers:
        weight = model.get_submodule(name).weight
        read = functional.dequantize_4bit(weight.data, weight.quant_state)
        blocks = whole[name].reshape(-1, BLOCK)
        scale = blocks.abs().amax(1, keepdim=True)
        nearest = values[(blocks / scale)[..., None].sub(values).abs().argmin(-1)] * scale
        # Rounded scales (double quantisation) are off by a hundredth of themselves at most.
        off = 1e-5 if storage is BaseStorage.NF4 else 0.02
        assert ((read.reshape(-1, BLOCK) - nearest) / scale).abs().max() < off


@pytest.mark.parametrize(("rslora", "scale"), [(False, 8 / 4), (True, 8 / 2)])
def test_an_adapter_adds_what_its_formula_says(rslora, scale) -> None:
    """alpha / r, and of rsLoRA alpha / sqrt(r) (arXiv:2312.03732), times B A x."""
    torch = pytest.importorskip("torch")
    from autotune.runner.models import add_adapter

    model = add_adapter(made_model(), LORA.model_copy(update={"rslora": rslora}))
    torch.manual_seed(4)
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    assert len(layers) == 14
    for layer in layers:
        low, high = (getattr(layer, f"lora_{side}")["default"].weight for side in "AB")
        high.data.normal_()
        x = torch.randn(2, layer.base_layer.in_features)
        want = layer.base_layer(x) + scale * x @ low.T @ high.T
        torch.testing.assert_close(layer(x), want, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
def test_an_8_bit_optimizer(strategy, tmp_path, corpus, initial_state) -> None:
    plan = make_plan(strategy, 2, micro_batch_size=4)
    run = {"learning_rate": 3e-3, "precision": "bf16"}
    want, _ = train(tmp_path / "32", corpus, initial_state, plan, optimizer="adamw", **run)
    loss, asserted = train(
        tmp_path / "8", corpus, initial_state, plan, optimizer="adamw_8bit", **run
    )
    print("8 bits:", loss, "32 bits:", want)
    assert asserted["optimizer"] == "adamw_8bit"
    assert loss[-1] < loss[0] - 0.1
    # Off by 0.0003 with states rounded to 8 bits; another rate or beta is off by far more.
    assert loss == pytest.approx(want, abs=0.003)
