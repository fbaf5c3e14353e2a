"""What a study leaves for people: summary.json, best.yml, trials.csv, report.html."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autotune import __version__
from autotune.config import AutotuneBlock, fallback_ladder
from autotune.emit.axolotl import emit_axolotl
from autotune.report.answer import standings
from autotune.report.csv import write_csv
from autotune.report.html import write_html
from autotune.report.study import Study, load_study
from autotune.search.confirm import confirmations_in, finalists_of
from autotune.search.confirmed import Verdict, failures, judge
from autotune.search.study import (
    CONTRACT_FILE,
    SUMMARY_FILE,
    Contract,
    data_counts,
    fingerprint,
    write_json,
    write_text,
)
from autotune.spec.training import TrainSettings
from autotune.trial.record import TrialRecord

if TYPE_CHECKING:  # the tuner brings Optuna
    from autotune.search.tuner import Stopped

BEST_FILE = "best.yml"


class Outputs:
    """Writes the outputs from the records on disk; called after each launch and at the end."""

    def __init__(
        self, folder: Path, contract: Contract, rejected: list[dict[str, Any]], *, seed: int
    ) -> None:
        self._folder = folder
        self._contract = contract
        self._rejected = rejected
        self._seed = seed

    def write(
        self, stopped: Stopped, *, final: bool, left_out: Sequence[dict[str, Any]] = ()
    ) -> Study:
        """Bring every output up to date; return the study as it now stands on disk.

        Args:
            stopped: How the search ended, or stands.
            final: Whether it ended.
            left_out: Plans that trials have ruled out since the search began.
        """
        study = load_study(self._folder)
        confirmations = confirmations_in(self._folder)
        failed = set(failures(confirmations))
        # A resumed search may have found what is faster than all that was confirmed before.
        held = [record for record in study.records if record.plan_id not in failed]
        today = {record.plan_id for record in finalists_of(held, len(held))} | failed
        verdict = judge([c for c in confirmations if c.plan_id in today], study.records)
        winner = _winner(study.records, verdict, failed)
        data = data_counts(self._folder)
        if winner is not None:
            write_text(self._folder / BEST_FILE, self._best_yml(winner))
        write_json(
            self._folder / SUMMARY_FILE,
            {
                "study": study.name,
                "best": _best(winner) if winner else None,
                "confirmation": None if verdict is None else verdict.to_dict(),
                "stopped_because": stopped.because if final else "",
                "data": None if data is None else data.model_dump(),
                "rejected": [*self._rejected, *left_out],
                "launches": stopped.launches,
                "elapsed_s": stopped.elapsed_s,
                "trials": [record.to_dict() for record in study.records],
            },
        )
        study = load_study(self._folder)
        write_csv(study, study.folder.csv_file)
        if final:  # megabytes: not after every launch
            write_html(study, study.folder.html_file)
        return study

    def _best_yml(self, winner: TrialRecord) -> str:
        contract = self._contract
        plan = winner.plan_object
        versions = json.loads((self._folder / CONTRACT_FILE).read_text())["versions"]
        block = AutotuneBlock(
            version=__version__,
            num_gpus=plan.world_size,
            device=contract.device,
            hardware={
                "gpu": contract.hardware.gpu.name,
                "fingerprint": fingerprint(contract.hardware),
            },
            plan_id=plan.id,
            measured=_measured(winner),
            ladder=tuple(fallback_ladder(plan)),
            versions=versions,
        )
        return emit_axolotl(
            contract.model,
            contract.workload,
            plan,
            train=contract.start.train if contract.start else TrainSettings(),
            datasets=contract.datasets,
            output_dir=str(self._folder / "model-out"),
            seed=self._seed,
            device="cuda" if contract.device == "cuda" else "cpu",
            autotune=block,
            file_name=str(self._folder / BEST_FILE),
        )


def _winner(
    records: Sequence[TrialRecord], verdict: Verdict | None, failed: set[str]
) -> TrialRecord | None:
    """Return the confirmed record with its confirmed figures, else the fastest that did not fail.

    Args:
        records: Of the search.
        verdict: Of its confirmations.
        failed: Plans that did not hold in theirs.
    """
    if verdict is None:
        held = [record for record in records if record.plan_id not in failed]
        return next(iter(standings(held)), None)
    won = verdict.winner
    return replace(
        won.last,
        tokens_per_s=won.tokens_per_s,
        step_s=won.step_s,
        step_s_low=won.step_s * won.tokens_per_s / won.high,
        step_s_high=won.step_s * won.tokens_per_s / won.low if won.low > 0 else None,
        peak_reserved_bytes=won.peak_bytes,
    )


def _best(winner: TrialRecord) -> dict[str, Any]:
    return {"plan_id": winner.plan_id, "plan": winner.plan, "measured": _measured(winner)}


def _measured(record: TrialRecord) -> dict[str, Any]:
    names = (
        "tokens_per_s", "step_s", "step_s_low", "step_s_high", "peak_allocated_bytes",
        "peak_reserved_bytes",
    )  # fmt: skip
    measured: dict[str, Any] = {name: getattr(record, name) for name in names}
    return measured | {"measured_accum_steps": list(record.measured_accum_steps)}
