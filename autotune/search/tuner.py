"""The search loop: ask, launch, record, tell, until the space or the budget is spent."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from autotune.errors import NothingFitsError
from autotune.plan import Plan
from autotune.planner import Estimate
from autotune.search.asker import Asker
from autotune.search.learning import Learner, by_family
from autotune.search.space import Family, hopeful, predicted_oom
from autotune.spec.training import DatasetSource
from autotune.spec.workload import Workload
from autotune.trial.folder import numbered_launches, read_results
from autotune.trial.launch import Ended, Limits, run_launch
from autotune.trial.native_ops import build_native_ops
from autotune.trial.outcome import read_rungs
from autotune.trial.processes import kill_tagged
from autotune.trial.protocol import (
    REQUEST_FILE,
    Measurement,
    ModelSource,
    Outcome,
    Request,
    Rung,
    read_message,
    write_message,
)
from autotune.trial.ranks import Starter
from autotune.trial.record import TrialRecord
from autotune.trial.store import RecordStore

LAUNCHES = "launches"
STUDY_VARIABLE = "AUTOTUNE_STUDY"

_START_S = {"cpu": 90.0, "cuda": 180.0}
"""Imports, process groups and a small model; larger models add to it."""
_LOAD_BYTES_PER_S = 0.5e9
_SAFETY = 8.0
"""How many times its predicted time a launch may take: the first time model is rough."""
_HANG_S = 120.0


class Progress(Protocol):
    """Where the search says what it does; see `autotune.report.console.LiveProgress`."""

    def start(  # noqa: D102
        self,
        total_launches: int | None,
        budget_s: float | None,
        *,
        known: Sequence[TrialRecord] = (),
        launches_left: int | None = None,
    ) -> None: ...
    def launch_started(self, n: int, description: str) -> None: ...  # noqa: D102
    def rung_done(self, record: TrialRecord) -> None: ...  # noqa: D102
    def launch_done(self, n: int) -> None: ...  # noqa: D102
    def note(self, text: str) -> None: ...  # noqa: D102
    def stop(self) -> None: ...  # noqa: D102


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What every launch of a study has in common."""

    model: ModelSource
    num_parameters: int
    workload: Workload
    device: str
    memory_limit_bytes: int | None
    datasets: Sequence[DatasetSource]
    measurement: Measurement
    seed: int = 42
    trial_timeout_s: float | None = None
    """Deadline of a launch; None derives it from the predicted time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stopped:
    """How the search ended."""

    because: str
    launches: int
    elapsed_s: float
    interrupted: bool = False


class Tuner:
    """Runs a study in a folder. All it knows is on disk, so a killed search can be resumed."""

    def __init__(
        self,
        folder: Path,
        families: Sequence[Family],
        job: Job,
        progress: Progress,
        learner: Learner | None = None,
        starter: Starter | None = None,
    ) -> None:
        self._folder = folder
        self._families = {family.name: family for family in families}
        self._job = job
        self._progress = progress
        self._learner = learner
        self._starter = starter
        self.store = RecordStore(folder)
        self._asker = Asker(folder, families, seed=job.seed)
        self._data_said = False

    def run(
        self,
        *,
        max_launches: int | None,
        budget_s: float | None,
        after_launch: Callable[[Stopped], object],
    ) -> Stopped:
        """Search until a stop rule holds.

        Args:
            max_launches: Launches of the study, those before a resume included.
            budget_s: Seconds of this call.
            after_launch: Called after each launch, to bring summary and reports up to date.
        """
        started = time.monotonic()
        try:
            self._recover()
            self._progress.start(
                max_launches,
                budget_s,
                known=self.store.all(),
                launches_left=self._launches_left(max_launches),
            )
            while True:
                stopped = self._stop_rule(started, max_launches, budget_s)
                if stopped is not None:
                    return stopped
                deadline = None if budget_s is None else started + budget_s
                self._launch(self._asker.ask(self._untried()), deadline)
                after_launch(self._stopped("still running", started))
        except KeyboardInterrupt:
            return replace(self._stopped("interrupted", started), interrupted=True)
        finally:
            self._progress.stop()

    def _stop_rule(
        self, started: float, max_launches: int | None, budget_s: float | None
    ) -> Stopped | None:
        if not self._untried():
            return self._stopped("every configuration of the space was tried", started)
        if max_launches is not None and self._num_finished() >= max_launches:
            return self._stopped(f"{max_launches} launches done (--trials)", started)
        if budget_s is not None and time.monotonic() - started >= budget_s:
            return self._stopped("the time budget is spent (--budget)", started)
        return None

    def _stopped(self, because: str, started: float) -> Stopped:
        return Stopped(
            because=because,
            launches=len(self._launches()),
            elapsed_s=time.monotonic() - started,
        )

    def _untried(self) -> list[Family]:
        return [family for family in self._families.values() if self._open_rungs(family)]

    def _launches_left(self, max_launches: int | None) -> int:
        """Return how many launches are to come: one a family, unless `--trials` ends it before."""
        untried = len(self._untried())
        if max_launches is None:
            return untried
        return min(untried, max(0, max_launches - self._num_finished()))

    def _open_rungs(self, family: Family) -> list[Rung]:
        """Return the rungs a launch of this family would still measure.

        None above a failure, and none above the first that what was measured so far rules out; that
        one only where the launch is paid for by a rung below.
        """
        plans = [estimate.plan for estimate in hopeful(self._unmeasured(family))]
        return [
            Rung(micro_batch_size=p.micro_batch_size, grad_accum_steps=p.grad_accum_steps)
            for p in plans
        ]

    def left_out(self) -> list[dict[str, Any]]:
        """Return the plans of the space that measured trials rule out by now, with the reason."""
        found = []
        for family in self._families.values():
            unmeasured = self._unmeasured(family)
            found += [predicted_oom(e) for e in unmeasured[len(hopeful(unmeasured)) :]]
        return found

    def _unmeasured(self, family: Family) -> list[Estimate]:
        """Return the rungs without a record, as judged by now; none where a rung failed."""
        rungs = []
        for estimate in self._judged(family).ladder:
            record = self.store.get(estimate.plan.id)
            if record is None:
                rungs.append(estimate)
            elif record.outcome not in (Outcome.OK, Outcome.THRASH):
                return []
        return rungs

    def _judged(self, family: Family) -> Family:
        return family if self._learner is None else self._learner.judged(family)

    def _launch(self, family: Family, budget_ends: float | None) -> None:
        number = self._next_number()
        rungs = self._open_rungs(family)
        folder = self._folder / LAUNCHES / f"{number:04d}-{family.name.replace(' ', '-')}"
        request = self._request(family, rungs, folder)
        sizes = ", ".join(str(rung.micro_batch_size) for rung in rungs)
        self._progress.launch_started(number, f"{family.name}, micro batch {sizes}")
        notes: list[str] = []
        folder.mkdir(parents=True, exist_ok=True)
        write_message(request, folder / REQUEST_FILE)
        limits = self._limits(family, rungs, budget_ends)
        tag = {STUDY_VARIABLE: str(self._folder.resolve())}
        try:
            built_s = build_native_ops(request, folder, note=notes, environment=tag)
            if built_s > 5:
                notes.append(f"built native operators in {built_s:.0f} s")
            limits = self._limits(family, rungs, budget_ends)  # what the build left of the budget
            ended = run_launch(request, folder, limits, environment=tag, starter=self._starter)
        except NothingFitsError as error:  # no compiler: other families need none
            ended = _not_started(str(error))
        except KeyboardInterrupt:
            kept = self._keep_finished(family, request, number, folder)
            self._asker.tell(family, kept)
            raise
        if ended.outcome is Outcome.TIMEOUT and _cut_by_budget(limits, budget_ends):
            ended = replace(ended, outcome=Outcome.INTERRUPTED, message="the time budget was spent")
        records = self._record(family, request, ended, number, folder)
        self._asker.tell(family, records)
        if not self._data_said and ended.results and ended.results[0].data is not None:
            self._data_said = True
            notes.append(f"data: {ended.results[0].data.words()}")
        for text in (*notes, *ended.notes):
            self._progress.note(text)
        for record in records:
            self._progress.rung_done(record)
        self._progress.launch_done(number)

    def _record(
        self, family: Family, request: Request, ended: Ended, number: int, folder: Path
    ) -> list[TrialRecord]:
        records = read_rungs(request, ended.results, ended.outcome, ended.message)
        if ended.outcome is Outcome.INTERRUPTED:
            records = [r for r in records if r.outcome is not Outcome.INTERRUPTED]
        judged = self._judged(family)
        added = self.store.add(
            _with_prediction(record, judged, number, folder, self._folder, ended)
            for record in records
        )
        if self._learner is not None:
            self._learner.learn(family, added)
        return added

    def _keep_finished(
        self, family: Family, request: Request, number: int, folder: Path
    ) -> list[TrialRecord]:
        """Record the rungs that a launch had finished when it was cut short."""
        ended = Ended(
            outcome=Outcome.INTERRUPTED,
            message="the search was stopped",
            rank=None,
            exit_codes=[],
            elapsed_s=0.0,
            results=read_results(folder),
        )
        return self._record(family, request, ended, number, folder)

    def _recover(self) -> None:
        """Bring in what a dead search left: its ranks, its finished rungs, its open trial."""
        kill_tagged(STUDY_VARIABLE, str(self._folder.resolve()))
        if self._learner is not None:
            for measured, records in by_family(self._families.values(), self.store.all()):
                self._learner.learn(measured, records)
        for number, folder in self._launches():
            if not (folder / REQUEST_FILE).exists():
                continue
            request = read_message(Request, folder / REQUEST_FILE)
            family = self._family_of(request)
            known = [
                rung for rung in request.rungs if self._plan_of(request, rung).id in self.store
            ]
            if family is None or len(known) == len(request.rungs):
                continue
            found = self._keep_finished(family, request, number, folder)
            if found:
                self._progress.note(f"kept {len(found)} finished rungs of launch {number}")
        closed = self._asker.recover(self.store.all())
        if closed:
            self._progress.note(f"closed {closed} trial(s) of a search that was killed")

    def _plan_of(self, request: Request, rung: Rung) -> Plan:
        return replace(
            request.plan_object(),
            micro_batch_size=rung.micro_batch_size,
            grad_accum_steps=rung.grad_accum_steps,
        )

    def _family_of(self, request: Request) -> Family | None:
        wanted = request.plan_object().family_id
        return next(
            (f for f in self._families.values() if f.ladder[0].plan.family_id == wanted), None
        )

    def _launches(self) -> list[tuple[int, Path]]:
        return numbered_launches(self._folder / LAUNCHES)

    def _next_number(self) -> int:
        """Return a number no launch had, also one whose folder was deleted since."""
        used = [number for number, _ in self._launches()]
        used += [record.launch for record in self.store.all()]
        return max(used, default=0) + 1

    def _num_finished(self) -> int:
        """Count the launches that measured something; one cut short uses up none of `--trials`."""
        return len({record.launch for record in self.store.all()})

    def _request(self, family: Family, rungs: list[Rung], folder: Path) -> Request:
        first = family.rung(rungs[0].micro_batch_size).plan
        job = self._job
        return Request(
            launch_id=folder.name,
            mode="trial",
            model=job.model,
            plan=first.to_dict(),
            workload=job.workload,
            device="cuda" if job.device == "cuda" else "cpu",
            out_dir=str(folder),
            rungs=rungs,
            measurement=job.measurement,
            memory_limit_bytes=job.memory_limit_bytes,
            datasets=list(job.datasets),
            seed=job.seed,
        )

    def _limits(self, family: Family, rungs: list[Rung], budget_ends: float | None) -> Limits:
        job = self._job
        if job.trial_timeout_s is not None:
            deadline = job.trial_timeout_s
        else:
            measure = job.measurement
            micro_steps = 0.0
            for rung in rungs:
                estimate = family.rung(rung.micro_batch_size)
                micro_s = estimate.time.step_s / estimate.plan.grad_accum_steps
                steps = measure.warmup_steps + measure.min_steps
                # Accumulation 1 and up to 4 (see runner.ladder), plus the time a rung may fill.
                micro_steps += 5 * steps * micro_s + 2 * measure.target_seconds
            load = job.num_parameters * 4 / _LOAD_BYTES_PER_S
            deadline = _START_S[job.device] + load + _SAFETY * micro_steps
        if budget_ends is not None:
            deadline = min(deadline, max(1.0, budget_ends - time.monotonic()))
        return Limits(
            deadline_s=deadline, hang_s=max(_HANG_S, _SAFETY * _longest_micro_step_s(family))
        )


def _longest_micro_step_s(family: Family) -> float:
    return max(e.time.step_s / e.plan.grad_accum_steps for e in family.ladder)


def _not_started(why: str) -> Ended:
    return Ended(outcome=Outcome.CRASHED, message=why, rank=None, exit_codes=[], elapsed_s=0.0)


def _cut_by_budget(limits: Limits, budget_ends: float | None) -> bool:
    return budget_ends is not None and time.monotonic() >= budget_ends - 1.0


def _with_prediction(
    record: TrialRecord, family: Family, number: int, folder: Path, study: Path, ended: Ended
) -> TrialRecord:
    estimate = family.rung(record.plan_object.micro_batch_size)
    low, high = estimate.peak.interval_bytes
    started = (folder / REQUEST_FILE).stat().st_mtime
    return replace(
        record,
        launch=number,
        predicted_bytes=estimate.peak.expected_bytes,
        predicted_low_bytes=low,
        predicted_high_bytes=high,
        predicted_fit_probability=estimate.fit_probability,
        predicted_step_s=estimate.time.step_s,
        predicted_tokens_per_s=estimate.time.tokens_per_s,
        predicted_verdict=str(estimate.verdict),
        launch_s=ended.elapsed_s or None,
        started_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        log_dir=str(folder.relative_to(study)),
    )
