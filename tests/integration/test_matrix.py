"""Every legal combination starts, runs the engine it names, follows the one-process loss.

`make test` runs few that hold every pair of choices, `make test-slow` all. The illegal ones are in
tests/unit/test_matrix.py.
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


Logged = tuple[list[float], list[float]]
"""Loss and gradient norm of every step."""


def train(case: Case, folder: Path, corpus: Path, weights: Path, **changes: object) -> Logged:
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
    return logged(folder, "loss"), logged(folder, "grad_norm")


@pytest.fixture(scope="session")
def one_process(
    tmp_path_factory: pytest.TempPathFactory, corpus: Path, initial_state: Path
) -> Callable[[Case], Logged]:
    """Return what one process logs for a case's adapter and attention, trained when asked."""
    known: dict[tuple[str, str], Logged] = {}

    def get(case: Case) -> Logged:
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
    one_process: Callable[[Case], Logged],
    tmp_path: Path,
    corpus: Path,
    initial_state: Path,
) -> None:
    want_loss, want_norm = one_process(case)
    assert len(want_loss) == STEPS and min(want_norm) > 0.2, "it must train"
    loss, norm = train(case, tmp_path, corpus, initial_state)
    assert loss == pytest.approx(want_loss, abs=1e-5)
    assert norm == pytest.approx(want_norm, rel=1e-4), "a gradient of another scale"
