"""Families on real ranks, from random weights: every engine takes the same steps as one process.

In fp32, packed, under SGD, as in the parity tests; all in test-slow. `make test` has the families'
attention and experts in one process (test_family_attention.py).
"""

from __future__ import annotations

import functools

import pytest

from autotune.spec.workload import Workload
from tests.integration.families import CONFIGS, build, torch, transformers
from tests.integration.ranks import logged, make_plan, run_well, training_request

pytestmark = pytest.mark.integration

GLOBAL_BATCH, SEQ, STEPS = 4, 64, 3


@pytest.fixture(scope="module")
def train(tmp_path_factory, corpus):
    @functools.cache
    def run_family(family, strategy, ranks, cp, recompute, precision="fp32"):
        folder = tmp_path_factory.mktemp(f"{family}-{strategy}")
        micro_batch = GLOBAL_BATCH * cp // ranks // 2
        plan = make_plan(
            strategy, ranks, cp=cp, micro_batch_size=micro_batch, grad_accum_steps=2,
            recompute=recompute,
        )  # fmt: skip
        workload = Workload(
            seq_len=SEQ, global_batch_size=GLOBAL_BATCH, optimizer="sgd", precision=precision
        )
        request = training_request(
            plan, folder, data=corpus, workload=workload, config=CONFIGS[family],
            max_steps=STEPS, learning_rate=0.5, max_grad_norm=0.0,
        )  # fmt: skip
        run_well(request)
        return logged(folder, "loss"), logged(folder, "grad_norm")

    return run_family


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("family", "strategy", "cp", "recompute"),
    [
        pytest.param("gpt_oss", "fsdp2", 2, True, id="gpt_oss-fsdp2-cp2-recompute", marks=SLOW),
        pytest.param("gpt_oss", "zero3", 1, False, id="gpt_oss-zero3", marks=SLOW),
        pytest.param("gpt_oss", "zero2", 2, False, id="gpt_oss-zero2-cp2", marks=SLOW),
        pytest.param("mixtral", "zero3", 1, True, id="mixtral-zero3-recompute", marks=SLOW),
        pytest.param("qwen3_moe", "fsdp2", 1, False, id="qwen3_moe-fsdp2", marks=SLOW),
        pytest.param("gemma3", "fsdp2", 2, False, id="gemma3-fsdp2-cp2", marks=SLOW),
        pytest.param("phi3", "zero3", 1, False, id="phi3-zero3", marks=SLOW),
        pytest.param("olmo2", "fsdp2", 1, True, id="olmo2-fsdp2-recompute", marks=SLOW),
        pytest.param("mistral", "zero1", 2, False, id="mistral-zero1-cp2", marks=SLOW),
    ],
)
def test_same_steps_as_one_process(train, family, strategy, cp, recompute):
    losses, norms = train(family, "ddp", 1, 1, False)
    assert len(losses) == STEPS and abs(losses[0] - losses[-1]) > 1e-3
    other_losses, other_norms = train(family, strategy, 2, cp, recompute)
    assert other_losses == pytest.approx(losses, abs=1e-5)
    assert other_norms == pytest.approx(norms, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero3", "fsdp2"])
def test_a_scaled_embedding_in_bf16(train, strategy):
    """Gemma 3, whose embedding's factor ZeRO-3 builds in bf16, as it is used everywhere.

    DDP alone multiplies by it in fp32: a rounding of 2**-9 of every hidden state.
    """
    losses, _ = train("gemma3", "ddp", 2, 1, False, "bf16")
    other_losses, _ = train("gemma3", strategy, 2, 1, False, "bf16")
    assert len(losses) == STEPS and abs(losses[0] - losses[-1]) > 0.1
    assert other_losses == pytest.approx(losses, rel=2.0**-9)
    sharded, _ = train("gemma3", "zero2", 2, 1, False, "bf16")
    assert other_losses == pytest.approx(sharded, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero3", "fsdp2"])
def test_experts_start_from_weights_and_are_saved(tmp_path, corpus, strategy):
    """On disk the experts lie one by one; in the model they are stacked, and here sharded."""
    from autotune.runner.experts import EXPERTS_NAME, register_experts
    from autotune.runner.ulysses import ATTENTION_NAME, register_attention

    register_attention()
    register_experts()
    initial = build(CONFIGS["mixtral"], attention=ATTENTION_NAME, experts=EXPERTS_NAME)
    weights, folder = tmp_path / "initial", tmp_path / "run"
    initial.save_pretrained(weights)
    workload = Workload(
        seq_len=SEQ, global_batch_size=GLOBAL_BATCH, optimizer="sgd", precision="fp32"
    )
    request = training_request(
        make_plan(strategy, 2, micro_batch_size=2), folder, data=corpus, workload=workload,
        config=CONFIGS["mixtral"], weights=weights, max_steps=1, learning_rate=1e-6,
        max_grad_norm=0.0, save_final_weights=True,
    )  # fmt: skip
    run_well(request)
    final = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    moved = 0
    for (name, before), after in zip(initial.named_parameters(), final.parameters(), strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=1e-4, msg=name)
        moved += not torch.equal(after, before)
    assert moved > 0
