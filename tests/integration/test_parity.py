"""Every strategy trains the same model: loss and gradient norm against one process, in fp32.

20 steps from one saved state: loss to 1e-5 absolute, gradient norm before clipping to 1e-4
relative, at every step. SGD at lr 0.1 without clipping, because AdamW and clipping both hide a
gradient of the wrong scale; AdamW too, because its state is what ZeRO shards.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from autotune.plan import CpBackend
from autotune.spec.workload import Workload
from tests.integration.ranks import logged, make_plan, run_well, training_request
from tests.integration.reference import sgd_steps

pytestmark = pytest.mark.integration

STEPS = 20
GLOBAL_BATCH = 8
OPTIMIZERS = {
    "sgd": {"learning_rate": 0.1, "max_grad_norm": 0.0},
    "adamw": {"learning_rate": 1e-3, "max_grad_norm": 1.0},
}
# (strategy, ranks, sequence-parallel degree, micro batch, recompute)
CASES = [
    ("ddp", 2, 1, 2, False),
    ("ddp", 2, 1, 4, False),
    ("zero1", 2, 1, 2, False),
    ("zero2", 2, 1, 2, False),
    ("zero3", 2, 1, 2, False),
    ("zero2_offload_optimizer", 2, 1, 2, False),
    ("zero3_offload_params", 2, 1, 2, False),
    ("fsdp2", 2, 1, 2, False),
    ("fsdp2_no_reshard", 2, 1, 1, False),
    ("fsdp2_offload", 2, 1, 2, False),
    ("hsdp", 4, 1, 1, False),
    ("ddp", 2, 2, 4, False),
    ("zero1", 2, 2, 4, False),
    ("zero2", 2, 2, 4, False),
    ("zero3", 2, 2, 4, False),
    ("fsdp2", 2, 2, 4, False),
    ("zero2", 4, 2, 2, False),
    ("zero3", 4, 2, 2, False),
    ("fsdp2", 4, 2, 2, False),
    ("zero3", 2, 1, 4, True),
    ("fsdp2", 2, 2, 4, True),
]
SLOW = [
    ("zero2", 2, 1, 2, False),
    ("zero3", 2, 1, 2, False),
    ("zero2_offload_optimizer", 2, 1, 2, False),
    ("fsdp2_offload", 2, 1, 2, False),
    ("fsdp2", 2, 2, 4, False),
    ("ddp", 2, 1, 4, False),
    ("ddp", 2, 2, 4, False),
    ("zero1", 2, 2, 4, False),
    ("zero2", 2, 2, 4, False),
    ("zero3_offload_params", 2, 1, 2, False),
    ("zero2", 4, 2, 2, False),
    ("zero3", 4, 2, 2, False),
    ("zero3", 2, 1, 4, True),
    ("zero1", 2, 1, 2, False),
    ("fsdp2_no_reshard", 2, 1, 1, False),
    ("fsdp2", 4, 2, 2, False),
    ("hsdp", 4, 1, 1, False),
]
"""Left to make test-slow: the quick cases of test_matrix.py have every pair of these settings, in
fewer steps."""
RING = [
    ("zero2", 2, 2, 4, False),
    ("zero3", 2, 2, 4, False),
    ("fsdp2", 2, 2, 4, False),
    ("ddp", 2, 2, 4, False),
    ("zero1", 2, 2, 4, False),
    ("zero2", 4, 4, 4, False),
    ("fsdp2", 4, 2, 2, False),
    ("zero3", 4, 2, 2, False),
    ("zero3", 2, 2, 4, True),
    ("fsdp2", 2, 2, 4, True),
]
"""Ring attention: SGD packed and plain, because its kernels differ."""
QUICK_RING = [
    (True, ("zero2", 2, 2, 4, False)),
]
QUICK = {
    ("sgd", True): [c for c in CASES if c not in SLOW],
    ("adamw", True): [("zero1", 2, 1, 2, False)],
}


def _runs() -> list[object]:
    rows = []
    for optimizer in OPTIMIZERS:
        for packing in (True, False):
            for case in CASES:
                strategy, world, cp, micro, recompute = case
                kind = "packed" if packing else "plain"
                name = f"{optimizer}-{kind}-{strategy}-{world}r-cp{cp}-mbs{micro}"
                quick = case in QUICK.get((optimizer, packing), [])
                marks = [] if quick else [pytest.mark.slow]
                rows.append(
                    pytest.param(
                        optimizer, packing, *case, id=name + "-rc" * recompute, marks=marks
                    )
                )
    return rows


def _rings() -> list[object]:
    rows = []
    for packing in (True, False):
        for case in RING:
            strategy, world, cp, micro, recompute = case
            kind = "packed" if packing else "plain"
            name = f"{kind}-{strategy}-{world}r-cp{cp}-mbs{micro}" + "-rc" * recompute
            marks = [] if (packing, case) in QUICK_RING else [pytest.mark.slow]
            rows.append(pytest.param(packing, *case, id=name, marks=marks))
    return rows


@pytest.fixture(scope="session")
def reference(tmp_path_factory, corpus, initial_state):
    """Loss and gradient norm of one process, by (optimizer, packing); run when first asked for."""
    known: dict[tuple[str, bool], tuple[list[float], list[float]]] = {}

    def get(optimizer: str, packing: bool) -> tuple[list[float], list[float]]:
        if (optimizer, packing) not in known:
            folder = tmp_path_factory.mktemp("reference")
            plan = make_plan("ddp", 1, micro_batch_size=GLOBAL_BATCH, grad_accum_steps=1)
            known[optimizer, packing] = _train(
                plan, folder, corpus, initial_state, optimizer, packing
            )
        return known[optimizer, packing]

    return get


def _train(plan, folder: Path, corpus: Path, weights: Path, optimizer: str, packing: bool):
    workload = Workload(
        seq_len=64,
        global_batch_size=GLOBAL_BATCH,
        precision="fp32",
        packing=packing,
        optimizer=optimizer,
    )
    request = training_request(
        plan,
        folder,
        data=corpus,
        workload=workload,
        weights=weights,
        max_steps=STEPS,
        **OPTIMIZERS[optimizer],
    )
    run_well(request)
    return logged(folder, "loss"), logged(folder, "grad_norm")


@pytest.mark.parametrize(
    "packing", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["packed", "plain"]
)
def test_the_reference_itself(packing, reference, tmp_path, corpus, initial_state):
    """One process of the runner against plain transformers: an error common to all would show."""
    plan = make_plan("ddp", 1, micro_batch_size=GLOBAL_BATCH, grad_accum_steps=1)
    workload = Workload(
        seq_len=64, global_batch_size=GLOBAL_BATCH, precision="fp32", packing=packing
    )
    request = training_request(plan, tmp_path, data=corpus, workload=workload, max_steps=5)
    want_loss, want_norm = sgd_steps(initial_state, request, 5, OPTIMIZERS["sgd"]["learning_rate"])
    loss, norm = reference("sgd", packing)
    assert loss[:5] == pytest.approx(want_loss, abs=1e-5)
    assert norm[:5] == pytest.approx(want_norm, rel=1e-4)


@pytest.mark.parametrize(
    ("optimizer", "packing", "strategy", "world", "cp", "micro", "recompute"), _runs()
)
def test_parity(
    optimizer, packing, strategy, world, cp, micro, recompute,
    reference, tmp_path, corpus, initial_state,
):  # fmt: skip
    plan = make_plan(
        strategy,
        world,
        cp=cp,
        micro_batch_size=micro,
        grad_accum_steps=GLOBAL_BATCH // (world // cp * micro),
        recompute=recompute,
    )
    assert_agrees(plan, optimizer, packing, reference, tmp_path, corpus, initial_state)


@pytest.mark.parametrize(("packing", "strategy", "world", "cp", "micro", "recompute"), _rings())
def test_ring_parity(
    packing, strategy, world, cp, micro, recompute, reference, tmp_path, corpus, initial_state
):
    plan = make_plan(
        strategy,
        world,
        cp=cp,
        cp_backend=CpBackend.RING,
        heads_k_stride=2,
        micro_batch_size=micro,
        grad_accum_steps=GLOBAL_BATCH // (world // cp * micro),
        recompute=recompute,
    )
    assert_agrees(plan, "sgd", packing, reference, tmp_path, corpus, initial_state)


def assert_agrees(plan, optimizer, packing, reference, tmp_path, corpus, initial_state):
    want_loss, want_norm = reference(optimizer, packing)
    loss, norm = _train(plan, tmp_path, corpus, initial_state, optimizer, packing)
    assert len(loss) == len(want_loss) == STEPS
    worst_loss = max(abs(a - b) for a, b in zip(loss, want_loss, strict=True))
    worst_norm = max(abs(a / b - 1) for a, b in zip(norm, want_norm, strict=True))
    print(
        f"worst loss difference {worst_loss:.1e}, worst relative norm difference {worst_norm:.1e}"
    )
    assert worst_loss <= 1e-5
    assert worst_norm <= 1e-4
    assert want_loss[-1] < want_loss[0] - 0.05, "the reference must learn, or nothing is compared"
