"""What the finished trials of a study say about the memory of those that remain."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from autotune.calibrate.knowledge import known_times, time_fields, timer_of
from autotune.calibrate.residual import TimeResidual
from autotune.memory.fingerprint import Fingerprint, machine_fingerprint
from autotune.memory.knowledge import Entry, KnowledgeBase, known_rows, model_key
from autotune.memory.residuals import Residual, Residuals, Ruler, engine_label, ruler_of
from autotune.planner import judged
from autotune.search.space import Family
from autotune.spec.hardware import HardwareSpec
from autotune.spec.model import ModelSpec
from autotune.spec.workload import Workload
from autotune.timing import Calibration
from autotune.trial.protocol import Outcome
from autotune.trial.record import TrialRecord

_FAR_BELOW = 4
"""A peak predicted this many times below the limit fits, whatever trials say of the prediction."""


class Learner:
    """Judges estimates anew as trials finish, and keeps what they measured for later studies."""

    def __init__(
        self,
        model: ModelSpec,
        workload: Workload,
        hardware: HardwareSpec,
        machine: Fingerprint,
        base: KnowledgeBase | None,
        calibration: Calibration | None = None,
        resumed: Sequence[TrialRecord] = (),
    ) -> None:
        """Take what it judges by; `resumed` are the study's own records, if it has some already."""
        own = {(record.plan_id, record.started_at) for record in resumed}
        self._model = model_key(model)
        self._workload = hashlib.sha256(workload.model_dump_json().encode()).hexdigest()[:12]
        self._hardware = hardware
        self._machine = machine
        self._base = base
        self._ruler: Ruler = ruler_of(on_cpu=hardware.gpu.is_cpu)
        self._earlier = known_rows(base, machine, self._ruler, own) if base else []
        self._own: dict[str, Entry] = {}
        self._fitted: Residuals | None = None
        # Emulated or not, what projections in fp8 take tells nothing of others.
        self._timer = timer_of(calibration) + " fp8" * workload.fp8
        self._times = TimeResidual(known_times(base, machine, self._timer, own))

    @classmethod
    def of_machine(
        cls,
        model: ModelSpec,
        workload: Workload,
        hardware: HardwareSpec,
        calibration: Calibration | None = None,
        resumed: Sequence[TrialRecord] = (),
    ) -> Learner:
        """Return the learner of a search on this machine, with the user's knowledge base.

        Args:
            model: Of the study.
            workload: Of the study.
            hardware: Of the study.
            calibration: What its step times were predicted with.
            resumed: The study's records of before, which must not count as another study's, too.
        """
        machine = machine_fingerprint("cpu" if hardware.gpu.is_cpu else "cuda")
        return cls(
            model, workload, hardware, machine, KnowledgeBase.of_user(), calibration, resumed
        )

    @property
    def _residuals(self) -> Residuals:
        """How far real memory lies from the predicted, by all that is known."""
        if self._fitted is None:
            own = [entry.row() for entry in self._own.values()]
            self._fitted = Residuals.known(self._ruler, [*self._earlier, *own])
        return self._fitted

    def log_correction(self, families: Iterable[Family]) -> dict[str, float]:
        """Return what earlier studies here add to each plan's log of the predicted step time.

        Empty without any: what this study itself measures is the sampler's to learn from.
        """
        if not self._times.count:
            return {}
        plans = [estimate.plan for family in families for estimate in family.ladder]
        added, _ = self._times.predict(plans)
        return {plan.id: float(shift) for plan, shift in zip(plans, added, strict=True)}

    def learn(self, family: Family, records: Sequence[TrialRecord]) -> None:
        """Take in finished trials of a family; those of a study that is resumed as well."""
        new = [e for r in records if (e := self._entry(family, r)) is not None]
        new = [entry for entry in new if self._own.get(entry.plan_id) != entry]
        if not new:
            return
        self._own |= {entry.plan_id: entry for entry in new}
        if self._base is not None:
            self._base.add(new)
        self._fitted = None  # until it is asked for: most studies are far from their limit

    def judged(self, family: Family) -> Family:
        """Return the family with its estimates under what is known by now.

        What takes a small part of the memory is not judged anew: no trial would change it.
        """
        limit = self._hardware.gpu.memory_bytes
        if all(
            _FAR_BELOW * e.peak.expected_bytes < limit and e.fit_probability > 0.999
            for e in family.ladder
        ):
            return family
        plan = family.ladder[0].plan
        bias, scale, degrees = self._residuals.predict_columns(
            [engine_label(plan)],
            [str(plan.recompute)],
            np.zeros(len(family.ladder), dtype=np.int64),
            self._model,
            np.array([estimate.peak.measurable_bytes for estimate in family.ladder], float),
        )
        ladder = tuple(
            judged(
                estimate,
                self._hardware,
                Residual(
                    source=self._residuals.source,
                    count=self._residuals.count,
                    bias=float(bias[n]),
                    scale=float(scale[n]),
                    degrees=float(degrees[n]),
                ),
            )
            for n, estimate in enumerate(family.ladder)
        )
        return replace(family, ladder=ladder)

    def _entry(self, family: Family, record: TrialRecord) -> Entry | None:
        real = _real_bytes(record)
        plan = record.plan_object
        estimate = family.rung(plan.micro_batch_size)
        peak = estimate.peak
        exceeded = record.outcome is Outcome.OOM
        if exceeded:
            real = self._hardware.gpu.memory_bytes - peak.framework_bytes
        if not real or real <= 0:
            return None
        return Entry(
            fingerprint=self._machine.to_dict(),
            ruler=self._ruler,
            model=self._model,
            plan_id=record.plan_id,
            workload=self._workload,
            engine=engine_label(record.plan_object),
            recompute=str(record.plan_object.recompute),
            predicted_bytes=peak.measurable_bytes,
            real_bytes=real,
            exceeded=exceeded,
            recorded_at=record.started_at,
            **(
                time_fields(plan, estimate.time.step_s, record.step_s, self._timer)
                if record.step_s and not exceeded
                else {}
            ),
        )


def _real_bytes(record: TrialRecord) -> int | None:
    """Return what a trial took, as the limit counts it; None where it is not the plan's peak."""
    if record.outcome is not Outcome.OK:
        return None
    # One micro-step alone does not show what later ones add.
    if record.plan_object.grad_accum_steps > 1 and max(record.measured_accum_steps, default=0) < 2:
        return None
    return record.peak_reserved_bytes or record.peak_allocated_bytes


def by_family(
    families: Iterable[Family], records: Sequence[TrialRecord]
) -> list[tuple[Family, list[TrialRecord]]]:
    """Return each family with its records; records of no family are left out."""
    found = []
    for family in families:
        plans = {estimate.plan.id for estimate in family.ladder}
        own = [record for record in records if record.plan_id in plans]
        if own:
            found.append((family, own))
    return found
