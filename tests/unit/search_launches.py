"""Launches of real requests and folders, without the ranks."""

from __future__ import annotations

from pathlib import Path

from autotune.plan import Recompute
from autotune.planner import rank_plans
from autotune.search.job import Job
from autotune.search.space import Family, make_families
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


def two_families(global_batch_size: int = 4) -> tuple[list[Family], Job]:
    """Return ZeRO-2 and ZeRO-3, in this order, and the job of their launches."""
    model, workload = (
        load_model("tiny-qwen3"),
        Workload(seq_len=64, global_batch_size=global_batch_size),
    )
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
    return families, job


def measured(rung: Rung, step_s: float = 1.0) -> RungResult:
    """Return what a rank says of three steps."""
    part = AccumulationResult(
        grad_accum_steps=rung.grad_accum_steps,
        step_s=[step_s] * 3,
        micro_step_s=[0.2] * 3 * (rung.grad_accum_steps - 1),
        sync_micro_step_s=[0.2] * 3,
        optimizer_step_s=[0.1] * 3,
        valid_tokens=[100] * 3,
        mean_step_tokens=100,
        peak_allocated_bytes=1,
        peak_reserved_bytes=1,
    )
    return RungResult(
        micro_batch_size=rung.micro_batch_size, outcome=Outcome.OK, accumulations=[part]
    )


class FakeLaunch:
    """What a `ConversationalLaunch` of two ranks leaves in its folder, without the ranks."""

    def __init__(self, request: Request, folder: Path, limits, *, starter, environment) -> None:
        self._request = request.model_copy(update={"converses": True, "rungs": []})
        self._folder = folder
        self._done: list[RungResult] = []
        self.alive = True
        write_message(self._request, folder / REQUEST_FILE)

    def measure(self, rung: Rung, **kwargs) -> TrialRecord:
        self._done.append(measured(rung))
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
