"""Rows, errors and files of `gpu_grid.py`."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autotune.planner import Estimate
from autotune.trial.protocol import Outcome
from autotune.trial.record import TrialRecord


def row_of(
    record: TrialRecord, estimate: Estimate, device: str, adapter: bool, baseline_bytes: int
) -> dict[str, Any]:
    """Lay one measured configuration beside its prediction.

    Memory on CUDA: the caching allocator's peak against the part of the prediction the allocator
    sees; context and NCCL lie outside both (`baseline_bytes` is what the context took). On CPU: the
    growth of the resident set against the whole prediction.

    Errors are ``predicted / measured - 1``; None where nothing was measured.
    """
    plan = record.plan_object
    memory = estimate.memory
    predicted = memory.total_bytes if device == "cpu" else memory.allocator_bytes
    measured = record.peak_allocated_bytes
    ran = record.outcome in (Outcome.OK, Outcome.THRASH)
    return {
        "strategy": plan.strategy,
        "recompute": str(plan.recompute),
        "adapter": "lora" if adapter else "",
        "micro_batch_size": plan.micro_batch_size,
        "grad_accum_steps": plan.grad_accum_steps,
        "outcome": str(record.outcome),
        "message": record.message,
        "predicted_verdict": str(estimate.verdict),
        "predicted_bytes": predicted,
        "measured_bytes": measured,
        "memory_error": predicted / measured - 1 if ran and measured else None,
        "reserved_bytes": record.peak_reserved_bytes,
        "baseline_bytes": baseline_bytes,
        "predicted_peak_instant": memory.peak_instant,
        "predicted_step_s": estimate.time.step_s,
        "step_s": record.step_s,
        "step_s_low": record.step_s_low,
        "step_s_high": record.step_s_high,
        "time_error": estimate.time.step_s / record.step_s - 1 if record.step_s else None,
        "tokens_per_s": record.tokens_per_s,
        "micro_step_s": record.micro_step_s,
        "sync_micro_step_s": record.sync_micro_step_s,
        "optimizer_step_s": record.optimizer_step_s,
        "predicted_compute_s": estimate.time.compute_s + estimate.time.recompute_s,
        "predicted_optimizer_s": estimate.time.optimizer_s,
        "alloc_retries": record.alloc_retries,
        "measured_accum_steps": ";".join(map(str, record.measured_accum_steps)),
    }


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the errors of each kind of configuration, and of all of them.

    ``mean_absolute`` is the size of the error, ``median`` its direction; an error of 0.1 is 10%.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        kind = " ".join(filter(None, [row["strategy"], row["adapter"], row["recompute"]]))
        groups.setdefault(kind, []).append(row)
    if rows:
        groups["all"] = list(rows)
    return [{"configurations": kind} | _errors(held) for kind, held in groups.items()]


def _errors(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    errors: dict[str, Any] = {}
    for name in ("memory_error", "time_error"):
        values = [row[name] for row in rows if row[name] is not None]
        errors[f"num_{name}s"] = len(values)
        errors[f"mean_absolute_{name}"] = (
            statistics.mean(abs(value) for value in values) if values else None
        )
        errors[f"median_{name}"] = statistics.median(values) if values else None
    return errors


def print_errors(summary: Sequence[dict[str, Any]]) -> None:
    """Print the summary as a table."""
    print("\nprediction against measurement: mean absolute error (median error)")
    print(f"{'configurations':<24}{'num':>5}{'memory':>20}{'step time':>20}")
    for line in summary:
        cells = [_cell(line, "memory_error"), _cell(line, "time_error")]
        print(f"{line['configurations']:<24}{line['num_memory_errors']:>5}", end="")
        print("".join(f"{cell:>20}" for cell in cells))


def _cell(line: dict[str, Any], name: str) -> str:
    if line[f"mean_absolute_{name}"] is None:
        return "-"
    return f"{line[f'mean_absolute_{name}']:.1%} ({line[f'median_{name}']:+.1%})"


def write_outputs(folder: Path, document: dict[str, Any]) -> None:
    """Write grid.json, and its rows as grid.csv."""
    (folder / "grid.json").write_text(json.dumps(document, indent=1) + "\n")
    rows = document["rows"]
    if not rows:
        return
    with (folder / "grid.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
