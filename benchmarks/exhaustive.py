"""Measure every configuration of a finished study again, each alone in a fresh launch.

A search composes large accumulations and measures whole ladders in one launch. Here each plan that
ran is launched by itself, at its true accumulation, in rounds over all of them, so that slow drift
of the machine meets all alike. Says whether the search's winner is the best within the noise.

    python benchmarks/exhaustive.py STUDY --rounds 2 --out exhaustive.csv

The same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
from pathlib import Path

from autotune.report.answer import standings
from autotune.report.study import load_study
from autotune.trial.launch import Limits, run_launch
from autotune.trial.outcome import read_rungs
from autotune.trial.protocol import Measurement, Request, Rung, read_message

COLUMNS = [
    "round", "plan_id", "plan", "outcome", "tokens_per_s", "step_s", "step_s_low", "step_s_high",
    "searched_tokens_per_s",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--top", type=int, help="only the fastest N of the search")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    records = standings(load_study(args.study).records)[: args.top]
    rows = list(csv.DictReader(args.out.open())) if args.out.exists() else []
    done = {(int(row["round"]), row["plan_id"]) for row in rows}
    with args.out.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if not rows:
            writer.writeheader()
        for number in range(1, args.rounds + 1):
            for record in records:
                if (number, record.plan_id) in done:
                    continue
                row = measure(args.study, record) | {"round": number}
                writer.writerow(row)
                file.flush()
                rows.append(row)
                print(f"round {number}: {row['plan']}: {row['tokens_per_s'] or row['outcome']}")
    conclude(rows, records[0].plan_id)


def measure(study: Path, record) -> dict:
    """Launch one plan alone and return its row."""
    request = read_message(Request, study / record.log_dir / "request.json")
    plan = record.plan_object
    rung = Rung(micro_batch_size=plan.micro_batch_size, grad_accum_steps=plan.grad_accum_steps)
    with tempfile.TemporaryDirectory() as folder:
        request = request.model_copy(
            update={
                "plan": plan.to_dict(),
                "rungs": [rung],
                "out_dir": folder,
                "measurement": Measurement(max_direct_accumulation=10**6),
            }
        )
        ended = run_launch(request, Path(folder), Limits(deadline_s=600, hang_s=120))
        again = read_rungs(request, ended.results, ended.outcome, ended.message)[0]
    return {
        "plan_id": record.plan_id,
        "plan": plan.describe(),
        "outcome": again.outcome,
        "tokens_per_s": again.tokens_per_s,
        "step_s": again.step_s,
        "step_s_low": again.step_s_low,
        "step_s_high": again.step_s_high,
        "searched_tokens_per_s": record.tokens_per_s,
    }


def conclude(rows: list[dict], winner: str) -> None:
    """Print winner against best, with the spread between launches of one plan beside it.

    The search's own figure is another launch of the plan, so it counts for the spread.
    """
    measured: dict[str, list[float]] = {}
    ratios = []
    names = {row["plan_id"]: row["plan"] for row in rows}
    for row in rows:
        if row["tokens_per_s"]:
            again, searched = float(row["tokens_per_s"]), float(row["searched_tokens_per_s"])
            measured.setdefault(row["plan_id"], []).append(again)
            ratios.append(abs(again / searched - 1))
    medians = {plan: statistics.median(values) for plan, values in measured.items()}
    best = max(medians, key=lambda plan: medians[plan])
    gap = 1 - medians[winner] / medians[best]
    print(f"search's winner: {names[winner]}, {medians[winner]:.0f} tokens/s again")
    print(f"best again:      {names[best]}, {medians[best]:.0f} tokens/s")
    print(
        f"gap {gap:.1%}; a plan's second launch differs by {statistics.median(ratios):.1%} (median)"
    )


if __name__ == "__main__":
    main()
