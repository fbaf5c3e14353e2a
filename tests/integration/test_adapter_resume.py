"""A run of an adapter goes on from its checkpoint as if it had not stopped."""

from __future__ import annotations

from pathlib import Path

import pytest

from autotune.spec.workload import BaseStorage, Lora, Workload
from tests.integration.ranks import logged, make_plan, run_well, training_request

pytestmark = pytest.mark.integration

STEPS, STOP = 6, 3
KINDS = {
    "lora": Lora(r=4, alpha=8),
    "dora": Lora(r=4, alpha=8, dora=True),
    "nf4": Lora(r=4, alpha=8, base_storage=BaseStorage.NF4_DOUBLE),
}


def train(folder: Path, strategy: str, kind: str, corpus: Path, weights: Path, **settings):
    request = training_request(
        make_plan(strategy, 2, micro_batch_size=4),
        folder,
        data=corpus,
        workload=Workload(seq_len=64, global_batch_size=8, precision="fp32", adapter=KINDS[kind]),
        weights=weights,
        max_steps=STEPS,
        learning_rate=0.02,
        **settings,
    )
    run_well(request)
    return logged(folder, "loss")


@pytest.mark.parametrize(
    ("strategy", "kind"),
    [
        ("fsdp2", "nf4"),
        pytest.param("zero3", "lora", marks=pytest.mark.slow),
        pytest.param("zero2", "dora", marks=pytest.mark.slow),
        pytest.param("ddp", "nf4", marks=pytest.mark.slow),
        pytest.param("fsdp2", "dora", marks=pytest.mark.slow),
    ],
)
def test_the_losses_of_a_run_that_stayed(
    strategy: str, kind: str, tmp_path: Path, corpus: Path, initial_state: Path
) -> None:
    whole = train(tmp_path / "whole", strategy, kind, corpus, initial_state, save_steps=STOP)
    assert whole[STOP] - whole[-1] > 0.01, "a run that stood still would agree with anything"
    checkpoint = tmp_path / f"whole/checkpoint-{STOP}"
    later = train(
        tmp_path / "later", strategy, kind, corpus, initial_state, resume_from=str(checkpoint)
    )
    assert later == pytest.approx(whole[STOP:], abs=1e-5)
