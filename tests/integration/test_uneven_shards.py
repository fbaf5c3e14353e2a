"""Ranks that share a sequence and hold unlike numbers of trained tokens, some of them none.

Weighting each rank's mean alike would train them wrongly, and show nowhere where all tokens count.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autotune.plan import CpBackend, Plan
from autotune.resources import cache_dir
from autotune.spec.training import DatasetSource
from autotune.spec.workload import Workload
from autotune.trial.protocol import Request
from tests.integration.ranks import logged, make_plan, run_well, training_request
from tests.integration.reference import held_out_loss, sgd_steps

pytestmark = pytest.mark.integration

STEPS = 2
LEARNING_RATE = 0.3


def _request(plan: Plan, folder: Path, weights: Path, *, packing: bool) -> Request:
    rows = [
        {
            "instruction": f"Count to {n}. " + "Slowly. " * (15 * (n % 3)),
            "output": "one " * (1 + n % 5),
        }
        for n in range(60)
    ]
    file = folder / "answers.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    request = training_request(
        plan, folder, data=file, weights=weights, max_steps=STEPS, learning_rate=LEARNING_RATE,
        max_grad_norm=0.0, val_set_size=5,
        workload=Workload(
            seq_len=128, global_batch_size=4, precision="fp32", packing=packing, optimizer="sgd"
        ),
    )  # fmt: skip
    answers_alone = [DatasetSource(path=str(file), type="alpaca")]
    return request.model_copy(update={"datasets": answers_alone})


@pytest.mark.parametrize(
    ("strategy", "backend", "packing"),
    [("zero2", CpBackend.ULYSSES, False), ("fsdp2", CpBackend.RING, True)],
)
def test_each_token_counts_alike(
    strategy: str, backend: CpBackend, packing: bool, tmp_path: Path, initial_state: Path
) -> None:
    from autotune.runner.data import build_sequences

    plan = make_plan(strategy, 2, cp=2, cp_backend=backend, micro_batch_size=2, grad_accum_steps=2)
    request = _request(plan, tmp_path, initial_state, packing=packing)
    split = build_sequences(request, cache_dir() / "tokenized")
    assert split.validation is not None
    for rows in (split.train, split.validation):
        labels = rows.rows(list(range(len(rows)))).shift_labels
        trained = (labels.reshape(len(rows), plan.cp, -1) >= 0).sum(axis=2)
        assert (trained == 0).any(), "no shard is without a trained token"
    want_loss, want_norm = sgd_steps(initial_state, request, STEPS, LEARNING_RATE)
    run_well(request)
    assert logged(tmp_path, "loss") == pytest.approx(want_loss, abs=1e-5)
    assert logged(tmp_path, "grad_norm") == pytest.approx(want_norm, rel=1e-4)
    start = logged(tmp_path, "eval_loss")[0]
    assert start == pytest.approx(held_out_loss(initial_state, request), abs=1e-5)
