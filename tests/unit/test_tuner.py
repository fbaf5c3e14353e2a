"""The search loop where no rank can be started."""

from __future__ import annotations

from pathlib import Path

import pytest

from autotune.errors import NothingFitsError
from autotune.plan import Recompute
from autotune.planner import rank_plans
from autotune.search.space import make_families
from autotune.spec.hardware import load_hardware
from autotune.spec.model import load_model
from autotune.spec.strategy import load_strategies
from autotune.spec.workload import Workload
from autotune.trial.protocol import Measurement, ModelSource, Outcome
from autotune.trial.record import TrialRecord


class Silent:
    def start(self, *args, **kwargs) -> None: ...
    def launch_started(self, n: int, description: str) -> None: ...
    def rung_done(self, record: TrialRecord) -> None: ...
    def launch_done(self, n: int) -> None: ...
    def note(self, text: str) -> None: ...
    def stop(self) -> None: ...


def test_a_failed_native_build_ends_its_family_and_not_the_search(tmp_path: Path, monkeypatch):
    pytest.importorskip("optuna")
    from autotune.search import tuner

    def no_compiler(*args, **kwargs):
        raise NothingFitsError("could not be built: g++ not found")

    monkeypatch.setattr(tuner, "build_native_ops", no_compiler)
    model, workload = load_model("tiny-qwen3"), Workload(seq_len=64, global_batch_size=4)
    ranking = rank_plans(
        model, workload, load_hardware("cpu", 2), load_strategies(["zero2", "zero3"]),
        cp_degrees=[1], recompute=[Recompute.NONE],
    )  # fmt: skip
    families, _ = make_families(ranking.candidates)
    job = tuner.Job(
        model=ModelSource(name=model.name, config=model.hf_config),
        num_parameters=model.num_parameters,
        workload=workload,
        device="cpu",
        memory_limit_bytes=None,
        datasets=[],
        measurement=Measurement(),
    )
    search = tuner.Tuner(tmp_path, families, job, Silent())
    stopped = search.run(max_launches=None, budget_s=None, after_launch=lambda now: None)
    records = search.store.all()
    assert stopped.because == "every configuration of the space was tried"
    assert [record.outcome for record in records] == [Outcome.CRASHED] * 2
    assert {record.plan["strategy"] for record in records} == {"zero2", "zero3"}
    assert "g++ not found" in records[0].message
