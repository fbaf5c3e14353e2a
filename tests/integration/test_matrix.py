"""Every legal combination starts, runs the engine it names, follows the one-process loss.

`make test` runs fifteen that hold every pair of choices, `make test-slow` all. The illegal ones are
in tests/unit/test_matrix.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.matrix import GLOBAL_BATCH, Case, covering, every_case
from tests.integration.ranks import logged, make_plan, run_well, training_request

pytestmark = pytest.mark.integration
STEPS = 4
LEGAL = [case for case in every_case() if not case.broken()]
QUICK = covering([case for case in LEGAL if case.cp <= 2])


def train(case: Case, folder: Path, corpus: Path, weights: Path, **changes: object) -> list[float]:
    request = training_request(
        case.plan, folder, data=corpus, workload=case.workload, weights=weights, max_steps=STEPS,
        learning_rate=0.3, max_grad_norm=0.0,
    )  # fmt: skip
    request = request.model_copy(update=changes)
    asserted = run_well(request).results[0].asserted
    plan = request.plan_object()
    assert asserted["engine"] == str(plan.engine)
    assert asserted["groups"]["world"] == plan.world_size
    if plan.engine == "deepspeed":
        assert asserted["zero_stage"] == plan.zero_stage
    return logged(folder, "loss")


@pytest.fixture(scope="session")
def one_process(
    tmp_path_factory: pytest.TempPathFactory, corpus: Path, initial_state: Path
) -> Callable[[Case], list[float]]:
    """Return the losses of one process for a case's adapter and attention, trained when asked."""
    known: dict[tuple[str, str], list[float]] = {}

    def get(case: Case) -> list[float]:
        key = (case.adapter, case.attention)
        if key not in known:
            plan = make_plan("ddp", 1, micro_batch_size=GLOBAL_BATCH).to_dict()
            folder = tmp_path_factory.mktemp("one")
            changes = {"plan": plan, "out_dir": str(folder)}
            known[key] = train(case, folder, corpus, initial_state, **changes)
        return known[key]

    return get


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[] if case in QUICK else [pytest.mark.slow])
        for case in LEGAL
    ],
)
def test_it_runs_and_follows_one_process(
    case: Case,
    one_process: Callable[[Case], list[float]],
    tmp_path: Path,
    corpus: Path,
    initial_state: Path,
) -> None:
    want = one_process(case)
    assert want[0] - want[-1] > (1e-3 if case.adapter == "lora" else 0.1)
    got = train(case, tmp_path, corpus, initial_state)
    assert got == pytest.approx(want, abs=1e-5)
