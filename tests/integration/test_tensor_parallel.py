"""Tensor parallelism on real ranks: the same training as plain transformers on one process.

SGD without clipping, in fp32: a gradient of the wrong scale, or one that is a rank's part of a sum,
shows in the norm of its step and in the loss of the next.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autotune.plan import Plan
from autotune.spec.workload import Workload
from tests.integration.families import CONFIGS
from tests.integration.ranks import (
    logged,
    make_plan,
    run_well,
    small_config,
    training_request,
    trial_request,
)
from tests.integration.reference import held_out_loss, sgd_steps

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.integration

STEPS = 5
GLOBAL_BATCH = 8
LEARNING_RATE = 0.1
MODELS: dict[str, dict[str, Any]] = {
    # Norms of queries and keys, which see the rank's own heads alone.
    "qwen3": small_config(),
    "qwen3-untied": small_config(tie_word_embeddings=False),
    "llama": small_config(
        model_type="llama", architectures=["LlamaForCausalLM"], tie_word_embeddings=False,
        attention_bias=True, mlp_bias=True,
    ),
    "gemma3": CONFIGS["gemma3"] | {"num_hidden_layers": 2},
    "qwen2": CONFIGS["qwen2"] | {"num_hidden_layers": 2, "max_window_layers": 1},
    "mistral": CONFIGS["mistral"] | {"num_hidden_layers": 2},
    # 261 rows a rank, which no even number of shards divides.
    "uneven": small_config(vocab_size=522, tie_word_embeddings=False),
}  # fmt: skip
# (model, packed, strategy, ranks, tp, cp, micro batch, recompute)
QUICK = [
    ("qwen3", True, "fsdp2", 4, 2, 1, 2, False),
    ("llama", False, "fsdp2", 4, 2, 1, 4, True),
]
SLOW = [
    ("qwen3", False, "fsdp2", 4, 2, 1, 1, False),
    ("qwen3", True, "fsdp2", 4, 2, 1, 4, True),
    ("qwen3", True, "fsdp2_no_reshard", 4, 2, 1, 2, False),
    ("qwen3-untied", True, "fsdp2", 4, 2, 1, 2, False),
    ("qwen3-untied", False, "fsdp2", 8, 4, 1, 4, False),
    ("qwen3", True, "fsdp2", 4, 2, 2, 4, False),
    ("qwen3", False, "fsdp2", 4, 2, 2, 8, True),
    ("qwen3", True, "fsdp2", 8, 2, 2, 2, False),
    ("qwen3", True, "hsdp", 8, 2, 1, 1, False),
    ("llama", True, "fsdp2", 4, 2, 1, 2, False),
    ("gemma3", True, "fsdp2", 4, 2, 1, 2, False),
    ("gemma3", False, "fsdp2", 4, 2, 1, 4, True),
    ("qwen2", True, "fsdp2", 4, 2, 1, 2, False),
    ("mistral", False, "fsdp2", 4, 2, 1, 2, False),
    ("uneven", True, "fsdp2", 8, 2, 1, 2, False),
]


def _name(case: tuple[Any, ...]) -> str:
    model, packed, strategy, ranks, tp, cp, micro, recompute = case
    kind = "packed" if packed else "plain"
    return f"{model}-{kind}-{strategy}-{ranks}r-tp{tp}-cp{cp}-mbs{micro}" + "-rc" * recompute


def _workload(*, packed: bool, **changes: Any) -> Workload:
    return Workload(
        seq_len=64, global_batch_size=GLOBAL_BATCH, precision="fp32", packing=packed,
        optimizer="sgd",
    ).model_copy(update=changes)  # fmt: skip


def _plan(strategy: str, ranks: int, tp: int, cp: int, micro: int, recompute: bool) -> Plan:
    groups = ranks // (tp * cp)
    return make_plan(
        strategy, ranks, tp=tp, cp=cp, micro_batch_size=micro, recompute=recompute,
        grad_accum_steps=GLOBAL_BATCH // (groups * micro),
    )  # fmt: skip


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A saved random state of each model, by its name; made when first asked for."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("weights")

    def get(name: str) -> Path:
        if not (folder / name).exists():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(**MODELS[name]), dtype=torch.float32
            )
            for key, parameter in model.named_parameters():
                # Larger than at the start of training: scales show. Norms and biases that differ
                # from one another: an entry that goes to another rank's place shows.
                if parameter.ndim > 1:
                    parameter.data.mul_(3)
                elif "bias" in key or "norm" in key:
                    parameter.data.add_(0.1 * torch.randn_like(parameter))
            model.save_pretrained(folder / name)
        return folder / name

    return get


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=_name(case)) for case in QUICK]
    + [pytest.param(case, id=_name(case), marks=pytest.mark.slow) for case in SLOW],
)
def test_parity(case, weights, tmp_path, corpus):
    model, packed, *layout = case
    plan = _plan(*layout)
    workload = _workload(packed=packed, chunked_loss=model == "llama")
    request = training_request(
        plan, tmp_path, data=corpus, workload=workload, config=MODELS[model],
        weights=weights(model), max_steps=STEPS, learning_rate=LEARNING_RATE, max_grad_norm=0.0,
        val_set_size=5,
    )  # fmt: skip
    want_loss, want_norm = sgd_steps(weights(model), request, STEPS, LEARNING_RATE)
    asserted = run_well(request).results[0].asserted
    assert asserted["groups"]["tensor-parallel"] == plan.tp
    loss, norm = logged(tmp_path, "loss"), logged(tmp_path, "grad_norm")
    print(f"worst loss difference {max(abs(a - b) for a, b in zip(loss, want_loss, strict=True))}")
    assert loss == pytest.approx(want_loss, abs=1e-5)
    assert norm == pytest.approx(want_norm, rel=1e-4), "a gradient of another scale"
    assert want_loss[-1] < want_loss[0] - 0.05, "the reference must learn, or nothing is compared"
    start = logged(tmp_path, "eval_loss")[0]
    assert start == pytest.approx(held_out_loss(weights(model), request), abs=1e-5)


@pytest.mark.parametrize("model", ["qwen3", pytest.param("uneven", marks=pytest.mark.slow)])
def test_it_goes_on_from_a_checkpoint_and_leaves_whole_weights(model, weights, tmp_path, corpus):
    plan = _plan("fsdp2", 4, 2, 1, 2, False)
    settings = {
        "data": corpus, "config": MODELS[model], "weights": weights(model), "max_steps": 4,
        "workload": _workload(packed=True, optimizer="adamw"), "save_steps": 2, "val_set_size": 5,
        "learning_rate": 3e-3, "lr_scheduler": "cosine", "save_final_weights": True,
    }  # fmt: skip
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    request = training_request(plan, whole, **settings)
    run_well(request)
    start, *_, end = logged(whole, "eval_loss")
    assert end == pytest.approx(held_out_loss(whole, request), abs=1e-5)
    assert start - end > 0.05, "untrained weights would pass for the final ones"
    checkpoint = str(whole / "checkpoint-2")
    run_well(training_request(plan, resumed, **settings, resume_from=checkpoint))
    for key in ("loss", "grad_norm"):
        assert logged(resumed, key) == logged(whole, key)[2:], key
    one, other = ((folder / "model.safetensors").read_bytes() for folder in (whole, resumed))
    assert one == other


@pytest.mark.parametrize(
    "layout", [("fsdp2", 4, 2, 1, 2, False), ("hsdp", 4, 1, 1, 2, False)], ids=["tp", "hsdp"]
)
def test_the_stacks_of_a_mesh_s_threads_are_no_memory_of_the_run(layout, tmp_path):
    """Each group has threads, whose untouched stacks alone went over a CPU rank's limit."""
    plan = _plan(*layout)
    request = trial_request(plan, tmp_path, rungs=[(2, 2)], memory_limit_bytes=100 * 2**20)
    results = run_well(request).results
    for part in (part for result in results for part in result.rungs[0].accumulations):
        assert part.peak_reserved_bytes - part.peak_allocated_bytes < 24 * 2**20


@pytest.mark.slow
def test_adamw_with_clipping_follows_one_process(weights, tmp_path, corpus):
    """A norm that counts a part twice, or an optimizer that steps a part of a tensor, shows."""
    logs = []
    for plan in (
        make_plan("ddp", 1, micro_batch_size=GLOBAL_BATCH, grad_accum_steps=1),
        _plan("fsdp2", 4, 2, 1, 2, False),
    ):
        folder = tmp_path / plan.strategy
        request = training_request(
            plan, folder, data=corpus, workload=_workload(packed=True, optimizer="adamw"),
            config=MODELS["qwen3"], weights=weights("qwen3"), max_steps=10, learning_rate=1e-3,
            max_grad_norm=0.5,
        )  # fmt: skip
        run_well(request)
        logs.append((logged(folder, "loss"), logged(folder, "grad_norm")))
    (want_loss, want_norm), (loss, norm) = logs
    assert loss == pytest.approx(want_loss, abs=1e-5)
    assert norm == pytest.approx(want_norm, rel=1e-4)
    assert min(want_norm) > 0.5, "nothing would be clipped"
