"""The search loop where no rank can be started."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from autotune.errors import NothingFitsError
from autotune.plan import Plan, Recompute
from autotune.planner import rank_plans
from autotune.search.space import make_families
from autotune.spec.hardware import load_hardware
from autotune.spec.model import load_model
from autotune.spec.strategy import load_strategies
from autotune.spec.workload import Workload
from autotune.trial.folder import read_results
from autotune.trial.launch import Ended
from autotune.trial.outcome import read_rung
from autotune.trial.protocol import (
    REQUEST_FILE,
    AccumulationResult,
    Measurement,
    ModelSource,
    Outcome,
    RankResult,
    Request,
    Rung,
    RungOrder,
    RungResult,
    rank_result_file,
    rung_file,
    write_message,
)
from autotune.trial.record import TrialRecord


class Silent:
    def start(self, *args, **kwargs) -> None:
        self.started = kwargs

    def launch_started(self, n: int, description: str) -> None: ...
    def rung_done(self, record: TrialRecord) -> None: ...
    def launch_done(self, n: int) -> None: ...
    def note(self, text: str) -> None: ...
    def stop(self) -> None: ...


def make_tuner(folder: Path, learner=None, sampler: str = "grid"):
    """A search of two families, ZeRO-2 and ZeRO-3, in this order."""
    from autotune.search import tuner
    from autotune.search.job import Job

    model, workload = load_model("tiny-qwen3"), Workload(seq_len=64, global_batch_size=4)
    ranking = rank_plans(
        model, workload, load_hardware("cpu", 2), load_strategies(["zero2", "zero3"]),
        cp_degrees=[1], recompute=[Recompute.NONE],
    )  # fmt: skip
    families, _ = make_families(ranking.candidates)
    job = Job(
        model=ModelSource(name=model.name, config=model.hf_config),
        num_parameters=model.num_parameters,
        workload=workload,
        device="cpu",
        memory_limit_bytes=None,
        datasets=[],
        measurement=Measurement(),
    )
    return tuner.Tuner(folder, families, job, Silent(), learner, sampler=sampler)


def test_a_failed_native_build_ends_its_family_and_not_the_search(tmp_path: Path, monkeypatch):
    pytest.importorskip("optuna")
    from autotune.search import live

    def no_compiler(*args, **kwargs):
        raise NothingFitsError("could not be built: g++ not found")

    monkeypatch.setattr(live, "build_native_ops", no_compiler)
    search = make_tuner(tmp_path)
    stopped = search.run(max_launches=None, budget_s=None, after_launch=lambda now: None)
    assert search._progress.started["launches_left"] == 2
    assert search._launches_left(None) == 0
    records = search.records
    assert stopped.because == "every configuration of the space was tried"
    assert [record.outcome for record in records] == [Outcome.CRASHED] * 2
    assert {record.plan["strategy"] for record in records} == {"zero2", "zero3"}
    assert "g++ not found" in records[0].message


def test_launch_numbers_are_the_folders_own_and_are_never_given_twice(tmp_path: Path, monkeypatch):
    """Launch 1 was deleted by hand; what 2 measured is its own, and the next one is 3."""
    pytest.importorskip("optuna")
    from autotune.search import live

    launches = tmp_path / live.LAUNCHES
    monkeypatch.setattr(live, "build_native_ops", lambda *args, **kwargs: 0.0)

    class Interrupted(FakeLaunch):
        """Ctrl-C comes when every rank has answered, before the search has seen it."""

        def measure(self, rung: Rung, **kwargs):
            super().measure(rung)
            raise KeyboardInterrupt

    monkeypatch.setattr(live, "ConversationalLaunch", Interrupted)
    stopped = make_tuner(tmp_path).run(max_launches=None, budget_s=None, after_launch=print)
    assert stopped.interrupted
    (first,) = launches.iterdir()
    first.rename(launches / first.name.replace("0001", "0002"))
    (tmp_path / "trials.jsonl").unlink()
    search = make_tuner(tmp_path)
    search.run(max_launches=None, budget_s=None, after_launch=print)
    assert [record.launch for record in search.records] == [2, 3]
    assert sorted(path.name[:4] for path in launches.iterdir()) == ["0002", "0003"]
    for folder in launches.iterdir():
        shutil.rmtree(folder)
    make_tuner(tmp_path).run(max_launches=None, budget_s=None, after_launch=print)
    assert [path.name[:4] for path in launches.iterdir()] == ["0004"], "records know 3"


class Ruled:
    """Learns from the first trial of ZeRO-2 that nothing of ZeRO-3 fits, and few of ZeRO-2."""

    def __init__(self) -> None:
        self.learned = []

    def learn(self, family, records) -> None:
        self.learned += [(family.name, record.outcome) for record in records]

    def log_correction(self, families):
        return {}

    def judged(self, family):
        if not self.learned:
            return family
        first = 0 if family.name == "zero3" else 1
        ladder = [
            replace(e, fit_probability=e.fit_probability if n < first else 0.0)
            for n, e in enumerate(family.ladder)
        ]
        return replace(family, ladder=tuple(ladder))


def test_what_trials_rule_out_is_not_launched_and_named(tmp_path: Path, monkeypatch):
    pytest.importorskip("optuna")
    from autotune.search import live

    launched = []

    class Noted(FakeLaunch):
        def __init__(self, request: Request, *args, **kwargs) -> None:
            launched.append(request.plan["strategy"])
            super().__init__(request, *args, **kwargs)

    monkeypatch.setattr(live, "build_native_ops", lambda *args, **kwargs: 0.0)
    monkeypatch.setattr(live, "ConversationalLaunch", Noted)
    ruled = Ruled()
    search = make_tuner(tmp_path, ruled)
    search.run(max_launches=None, budget_s=None, after_launch=lambda now: None)
    assert launched == ["zero2"] and ruled.learned[0] == ("zero2", Outcome.OK)
    measured = {record.plan_id for record in search.records}
    left_out = [Plan.from_dict(entry["plan"]) for entry in search.left_out()]
    assert {plan.strategy for plan in left_out} >= {"zero3"}
    assert not measured & {plan.id for plan in left_out}
    assert {entry["code"] for entry in search.left_out()} == {"PREDICTED_OOM"}
    again = make_tuner(tmp_path, other := Ruled())
    again.run(max_launches=None, budget_s=None, after_launch=lambda now: None)
    assert ("zero2", Outcome.OK) in other.learned, "a resumed study learns from its records"
    assert launched == ["zero2"]
    record = search.records[0]
    assert record.predicted_low_bytes < record.predicted_bytes < record.predicted_high_bytes
    assert 0 < record.predicted_fit_probability <= 1


class FakeLaunch:
    """What a `ConversationalLaunch` of two ranks leaves in its folder, without the ranks."""

    def __init__(self, request: Request, folder: Path, limits, *, starter, environment) -> None:
        self._request = request.model_copy(update={"converses": True, "rungs": []})
        self._folder = folder
        self._done: list[RungResult] = []
        self.alive = True
        write_message(self._request, folder / REQUEST_FILE)

    def measure(self, rung: Rung, **kwargs) -> TrialRecord:
        part = AccumulationResult(
            grad_accum_steps=rung.grad_accum_steps,
            step_s=[1.0] * 3,
            micro_step_s=[0.2] * 3 * (rung.grad_accum_steps - 1),
            sync_micro_step_s=[0.2] * 3,
            optimizer_step_s=[0.1] * 3,
            valid_tokens=[100] * 3,
            mean_step_tokens=100,
            peak_allocated_bytes=1,
            peak_reserved_bytes=1,
        )
        size = rung.micro_batch_size
        self._done.append(
            RungResult(micro_batch_size=size, outcome=Outcome.OK, accumulations=[part])
        )
        order = RungOrder(launch_id=self._request.launch_id, rung=rung)
        write_message(order, self._folder / rung_file(len(self._done)))
        for rank in (0, 1):
            result = RankResult(
                launch_id=self._request.launch_id, rank=rank, world_size=2, rungs=self._done
            )
            write_message(result, self._folder / rank_result_file(rank))
        results = read_results(self._folder)
        return read_rung(self._request.plan_object(), rung, results, Outcome.OK, "")

    def close(self, *, at_once: bool = False) -> Ended:
        self.alive = False
        return Ended(outcome=Outcome.OK, message="", rank=None, exit_codes=[0, 0], elapsed_s=1.0)
