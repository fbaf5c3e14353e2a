"""The private names of transformers and accelerate the runner leans on, at both ends of the range.

Every other test runs on the newest transformers that is installed; these run on the lowest that
pyproject.toml allows, put before it on the path of the ranks.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from autotune.spec.workload import Workload
from autotune.trial.protocol import Outcome
from tests.integration.ranks import (
    logged,
    make_plan,
    run,
    run_well,
    training_request,
    trial_request,
)

pytestmark = pytest.mark.integration

LOWEST = re.search(
    r"transformers>=([\d.]+)",
    " ".join(
        tomllib.loads(Path("pyproject.toml").read_text())["project"]["optional-dependencies"][
            "train"
        ]
    ),
)[1]


@pytest.fixture(scope="session")
def lowest_transformers(pytestconfig: pytest.Config) -> Path:
    """The lowest transformers and the hub client it needs, in a folder kept between runs."""
    target = pytestconfig.cache.mkdir(f"transformers-{LOWEST}")
    if not (target / "installed").exists():
        for what in (
            ["--no-deps", f"transformers=={LOWEST}.0"],
            ["--upgrade", "huggingface-hub>=1.5,<2"],
        ):
            subprocess.run(
                [sys.executable, "-m", "pip", "install", "-q", "--target", str(target), *what],
                check=True,
                timeout=300,
            )
        (target / "installed").touch()
    return target


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2", "zero2"])
def test_trial_on_the_lowest_transformers(strategy, lowest_transformers, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(lowest_transformers))
    request = trial_request(make_plan(strategy, 2), tmp_path, rungs=[(1, 4), (2, 2)])
    ended = run(request)
    assert ended.outcome is Outcome.OK, ended.message
    result = ended.results[0]
    assert result.versions["transformers"] == f"{LOWEST}.0"
    assert [rung.micro_batch_size for rung in result.rungs] == [1, 2]
    assert [a.grad_accum_steps for a in result.rungs[0].accumulations] == [4]


@pytest.mark.slow
def test_training_on_the_lowest_transformers(lowest_transformers, tmp_path, corpus, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(lowest_transformers))
    request = training_request(
        make_plan("fsdp2", 2, micro_batch_size=2, grad_accum_steps=2),
        tmp_path,
        data=corpus,
        workload=Workload(seq_len=64, global_batch_size=8),
        max_steps=4,
        save_steps=4,
        val_set_size=8,
        learning_rate=1e-3,
    )
    run_well(request)
    assert (tmp_path / "checkpoint-4" / "trainer_state.json").exists()
    evaluated = logged(tmp_path, "eval_loss")
    assert evaluated[-1] < evaluated[0]


def test_the_private_names_the_shim_replaces_are_there():
    from accelerate.state import PartialState

    assert list(inspect.signature(PartialState._prepare_backend).parameters) == [
        "self", "cpu", "sagemaker_dp", "backend",
    ]  # fmt: skip
    assert list(inspect.signature(PartialState.set_device).parameters) == ["self"]
