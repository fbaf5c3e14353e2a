"""A trial and a training run of the search's winner, in turns: what the drift of a machine hides.

    python benchmarks/search/live_pairs.py [--out FOLDER] [--rounds 4]

Goes on from what `live.py` left in FOLDER. Each round launches the winner alone, cold, then trains
it, and keeps every step's tokens/s: a machine that changes its speed in between shows in them.
Writes results/live_pairs.csv.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import statistics
import sys
from pathlib import Path

from live import RESULTS, SKIPPED_STEPS, TRAIN_STEPS, launch_alone, run, write_config

from autotune.plan import Plan
from autotune.report.study import load_study
from autotune.trial.protocol import Request, read_message


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("reports/live"))
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    study = args.out / "study"
    plan = Plan.from_dict(load_study(study).summary["best"]["plan"])
    template = read_message(Request, sorted((study / "launches").glob("*/request.json"))[0])
    config = args.out / "pairs.yml"
    write_config(study, plan, config)
    rows = []
    for turn in range(args.rounds):
        for kind, steps in (
            ("trial", trial_steps(template, plan, fresh(args.out / f"pair-trial-{turn}"))),
            ("train", train_steps(config, fresh(args.out / f"pair-train-{turn}"))),
        ):
            median = statistics.median(steps)
            rows.append({"round": turn, "kind": kind, "plan": plan.describe(), "median": median,
                         "steps": json.dumps([round(step) for step in steps])})  # fmt: skip
            print(f"{turn} {kind}: {median:,.0f} tokens/s", flush=True)
    with (RESULTS / "live_pairs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def trial_steps(template: Request, plan: Plan, folder: Path) -> list[float]:
    """Return the tokens/s of every counted step of a launch of its own."""
    record = launch_alone(template, plan, folder)
    return [(record.step_tokens or 0.0) / step_s for step_s in record.step_times_s]


def train_steps(config: Path, folder: Path) -> list[float]:
    """Return the tokens/s of every step of a training run, without those of its start."""
    run(
        sys.executable, "-m", "autotune", "train", str(config), "--output-dir", str(folder),
        "--max-steps", str(TRAIN_STEPS),
    )  # fmt: skip
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["tokens_per_s"] for line in lines if line.get("tokens_per_s")][SKIPPED_STEPS:]


if __name__ == "__main__":
    main()
