"""A trial trains as the run it stands for, and is refused where something else was asked for.

One rank, so that each engine costs a second: the imports are shared by all.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from autotune.spec.workload import Workload
from autotune.trial.launch import rank_environment
from autotune.trial.native_ops import build_native_ops
from autotune.trial.protocol import (
    REQUEST_FILE,
    Measurement,
    RankResult,
    rank_result_file,
    read_message,
    write_message,
)
from tests.integration.ranks import make_plan, trial_request
from tests.integration.trial_worker import SEEN_FILE, SLOWED_S, WRONG

pytestmark = pytest.mark.integration

STRATEGIES = ["ddp", "fsdp2", "zero2_offload_optimizer"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trials")


@pytest.fixture(scope="module")
def seen(base: Path) -> dict[str, dict[str, Any]]:
    """What the worker saw, by strategy."""
    # Two sequences in all and an even number of steps: every step of 4 reads each of them twice.
    workload = Workload(
        seq_len=64, global_batch_size=1, precision="fp32", packing=False, mean_document_tokens=20
    )
    requests = []
    for strategy in STRATEGIES:
        folder = base / strategy
        request = trial_request(
            make_plan(strategy, 1),
            folder,
            rungs=[(4, 1), (1, 4), (2, 2), (1, 6)],  # of 6, what it is composed from is measured
            workload=workload,
            measurement=Measurement(warmup_steps=1, min_steps=3, max_steps=3),
        )
        build_native_ops(request, folder)
        folder.mkdir(exist_ok=True)
        write_message(request, folder / REQUEST_FILE)
        requests.append(folder / REQUEST_FILE)
    variables = rank_environment(request, base, "trial-worker", 1) | {
        "RANK": "0",
        "LOCAL_RANK": "0",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.trial_worker", *map(str, requests)],
        env=variables, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    written = {name: base / name / SEEN_FILE for name in STRATEGIES}
    missing = [name for name, path in written.items() if not path.exists()]
    assert not missing, f"{missing}\n{done.stderr[-4000:]}"
    return {name: json.loads(path.read_text()) for name, path in written.items()}


@pytest.fixture(scope="module")
def results(seen: dict[str, dict[str, Any]], base: Path) -> dict[str, RankResult]:
    """What the rank answered, by strategy."""
    return {name: read_message(RankResult, base / name / rank_result_file(0)) for name in seen}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_gradient_of_a_trial_does_not_depend_on_the_accumulation(
    strategy: str, seen: dict[str, dict[str, Any]]
) -> None:
    norms = seen[strategy]["gradient_norms"]
    want = norms["4x1"][-1]
    assert want > 0.1, "gradients too small to compare"
    for split in ("4x1", "2x2", "1x4"):
        assert norms[split] == pytest.approx([want] * 4, rel=1e-4), split


def test_tokens_of_a_step_are_those_of_average_sequences(results: dict[str, RankResult]) -> None:
    """Steps of one sequence read the one or the other; steps of four read both, twice."""
    parts = [part for rung in results["ddp"].rungs for part in rung.accumulations]
    assert [part.grad_accum_steps for part in parts] == [1, 4, 2, 1, 2]
    whole, *_, single, double = parts
    mean = whole.valid_tokens[0] / 4
    assert whole.valid_tokens == [4 * mean] * 3 and whole.mean_step_tokens == 4 * mean
    assert len(set(single.valid_tokens)) == 2, "sequences of one length could not tell"
    assert single.mean_step_tokens == mean and double.mean_step_tokens == 2 * mean


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_was_not_asked_for_is_refused(strategy: str, seen: dict[str, dict[str, Any]]) -> None:
    said = seen[strategy]["refused"]
    want = {name: words for name, (_, _, words) in WRONG[strategy].items()}
    want |= {"buffer": "dtype of buffer", "group": "ranks answering in the world group"}
    assert set(said) == set(want)
    unlike = {name: said[name] for name, words in want.items() if words not in (said[name] or "")}
    assert not unlike


def test_the_optimizer_of_deepspeed_is_timed_apart(results: dict[str, RankResult]) -> None:
    """It runs inside the last micro-step, and must not be part of its time."""
    for rung in results["zero2_offload_optimizer"].rungs:
        for part in rung.accumulations:
            assert min(part.optimizer_step_s) >= SLOWED_S
            for whole, micro in zip(part.step_s, part.sync_micro_step_s, strict=True):
                assert micro <= whole - SLOWED_S


def test_deepspeed_is_told_of_every_split(seen: dict[str, dict[str, Any]]) -> None:
    """The gradients of DeepSpeed 0.19.8 would not show that it was not."""
    told = seen["zero2_offload_optimizer"]["deepspeed_told"]
    assert told == {
        f"{batch}x{steps}": [[batch, steps, steps]] * 4
        for batch, steps in ((4, 1), (1, 4), (2, 2), (1, 1), (1, 2))
    }
