"""The whole search against one launch a configuration, live: wall time and regret.

    python benchmarks/search/live.py [--out FOLDER] [--top 3] [--launches 3]

Searches the demo's space on 2 CPU ranks, confirmation included, then launches every configuration
of it by itself from fresh processes, as a user without a search would: the same runner, steps
and stop by interval. The winner's regret is judged by the single launches. Then the fastest plans
of the search are trained with ``autotune train``, in turns; what the search reported is compared
with what training does. Writes results/live.csv (a row a launch) and results/live_figures.csv.

Takes about twenty minutes on two quiet cores. The same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from autotune.config import AutotuneBlock, load_config
from autotune.emit.axolotl import emit_axolotl
from autotune.plan import Plan, Recompute
from autotune.planner import estimate_space
from autotune.report.study import load_study
from autotune.search.confirm import confirmations_in
from autotune.spec.hardware import detect_hardware
from autotune.spec.model import load_model
from autotune.spec.strategy import load_strategies
from autotune.spec.workload import Workload
from autotune.trial.launch import Limits, run_launch
from autotune.trial.outcome import read_rungs
from autotune.trial.protocol import Measurement, Request, Rung, read_message
from autotune.units import parse_bytes

HERE = Path(__file__).parent
RESULTS = HERE / "results"
ROOT = HERE.parents[1]
COLUMNS = ["kind", "plan_id", "plan", "outcome", "tokens_per_s", "wall_s"]
STRATEGIES = ["zero1", "zero2", "zero3", "fsdp2", "fsdp2_no_reshard"]
MICRO_BATCHES = [1, 2, 4]
CP_DEGREES = [1, 2]
LIMIT = "260MiB"
WORKLOAD = Workload(seq_len=256, global_batch_size=8)
TRAIN_STEPS = 14
SKIPPED_STEPS = 4
"""Of a training run: starting up."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("reports/live"))
    parser.add_argument("--top", type=int, default=3, help="plans that are trained")
    parser.add_argument("--launches", type=int, default=3, help="training runs of each")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    RESULTS.mkdir(exist_ok=True)
    log = Log(RESULTS / "live.csv")
    corpus = args.out / "corpus.jsonl"
    if not corpus.exists():
        run(sys.executable, str(ROOT / "benchmarks/build_corpus.py"), "--out", str(corpus))
    search(args.out / "study", corpus, log)
    launch_each(args.out, log)
    train_best(args.out, corpus, args.top, args.launches, log)
    conclude(args.out / "study", log)


class Log:
    """The rows of live.csv, kept as they come."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows = list(csv.DictReader(path.open())) if path.exists() else []

    def add(self, **row: object) -> None:
        self.rows.append({name: str(row.get(name, "")) for name in COLUMNS})
        with self._path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
        print({name: row.get(name) for name in COLUMNS if name != "plan_id"}, flush=True)

    def of(self, kind: str, plan_id: str | None = None) -> list[dict[str, str]]:
        return [
            row
            for row in self.rows
            if row["kind"] == kind and (plan_id is None or row["plan_id"] == plan_id)
        ]


def search(study: Path, corpus: Path, log: Log) -> None:
    """Run the search once, its time taken from outside."""
    if log.of("search"):
        return
    shutil.rmtree(study, ignore_errors=True)  # of a search that was cut: its time is not known
    started = time.monotonic()
    run(
        sys.executable, "-m", "autotune", "search", "--model", "tiny-qwen3", "--gpus", "2",
        "--device", "cpu", "--seq-len", str(WORKLOAD.seq_len),
        "--global-batch-size", str(WORKLOAD.global_batch_size), "--data", str(corpus),
        "--strategies", ",".join(STRATEGIES), "--micro-batches", ",".join(map(str, MICRO_BATCHES)),
        "--sequence-parallel", ",".join(map(str, CP_DEGREES)), "--recompute", "none",
        "--memory-limit", LIMIT, "--no-knowledge", "--out", str(study),
    )  # fmt: skip
    wall_s = time.monotonic() - started
    best = load_study(study).summary["best"]
    plan = Plan.from_dict(best["plan"])
    log.add(
        kind="search", plan_id=plan.id, plan=plan.describe(), outcome="ok",
        tokens_per_s=best["measured"]["tokens_per_s"], wall_s=wall_s,
    )  # fmt: skip


def launch_each(out: Path, log: Log) -> None:
    """Launch every plan of the space alone, cold."""
    first = sorted((out / "study" / "launches").glob("*/request.json"))[0]
    template = read_message(Request, first)
    hardware = detect_hardware(2, "cpu", parse_bytes(LIMIT))
    space = estimate_space(
        load_model("tiny-qwen3"), WORKLOAD, hardware, load_strategies(STRATEGIES),
        micro_batches=MICRO_BATCHES, cp_degrees=CP_DEGREES, recompute=[Recompute.NONE],
    )  # fmt: skip
    done = {row["plan_id"] for row in log.of("alone")}
    for number, candidate in enumerate(space.candidates):
        plan = candidate.plan
        if plan.id not in done:
            started = time.monotonic()
            record = launch_alone(template, plan, out / "alone" / f"{number:04d}")
            log.add(
                kind="alone", plan_id=plan.id, plan=plan.describe(), outcome=str(record.outcome),
                tokens_per_s=record.tokens_per_s or "", wall_s=time.monotonic() - started,
            )  # fmt: skip


def launch_alone(template: Request, plan: Plan, folder: Path):
    folder.mkdir(parents=True, exist_ok=True)
    rung = Rung(micro_batch_size=plan.micro_batch_size, grad_accum_steps=plan.grad_accum_steps)
    request = template.model_copy(
        update={
            "plan": plan.to_dict(),
            "rungs": [rung],
            "out_dir": str(folder.resolve()),
            "measurement": Measurement(),
            "converses": False,
            "rehearses": False,
        }
    )
    ended = run_launch(request, folder, Limits(deadline_s=300, hang_s=120))
    return read_rungs(request, ended.results, ended.outcome, ended.message)[0]


def train_best(out: Path, corpus: Path, top: int, launches: int, log: Log) -> None:
    """Train the fastest plans of the search, in turns, with ``autotune train``."""
    study = load_study(out / "study")
    ran = sorted((r for r in study.records if r.tokens_per_s), key=lambda r: -(r.tokens_per_s or 0))
    for turn in range(launches):
        for record in ran[:top]:
            plan = record.plan_object
            if len(log.of("train", plan.id)) > turn:
                continue
            config = out / f"train-{plan.id}.yml"
            write_config(out / "study", plan, config)
            folder = out / f"run-{plan.id}-{turn}"
            started = time.monotonic()
            run(
                sys.executable, "-m", "autotune", "train", str(config), "--output-dir", str(folder),
                "--max-steps", str(TRAIN_STEPS),
            )  # fmt: skip
            log.add(
                kind="train", plan_id=plan.id, plan=plan.describe(), outcome="ok",
                tokens_per_s=trained_speed(folder), wall_s=time.monotonic() - started,
            )  # fmt: skip


def write_config(study: Path, plan: Plan, path: Path) -> None:
    """Write the study's best.yml as it would be had this plan won."""
    best = load_config(study / "best.yml")
    text = emit_axolotl(
        best.model,
        WORKLOAD,
        plan,
        train=best.train,
        datasets=best.datasets,
        seed=best.seed,
        device="cpu",
        autotune=AutotuneBlock(num_gpus=plan.world_size, device="cpu"),
    )
    path.write_text(text)


def trained_speed(folder: Path) -> float:
    """Return the median tokens/s of a run's later steps."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    speeds = [line["tokens_per_s"] for line in lines if line.get("tokens_per_s")]
    return statistics.median(speeds[SKIPPED_STEPS:])


def conclude(study: Path, log: Log) -> None:
    """Print and write the figures."""
    (found,) = log.of("search")
    alone = log.of("alone")
    speeds = {r["plan_id"]: float(r["tokens_per_s"]) for r in alone if r["tokens_per_s"]}
    best = max(speeds, key=lambda plan: speeds[plan])
    winner = speeds.get(found["plan_id"])
    all_s = sum(float(row["wall_s"]) for row in alone)
    figures = [
        ("search_wall_s", float(found["wall_s"])),
        ("one_launch_each_wall_s", all_s),
        ("times_less", all_s / float(found["wall_s"])),
        ("configurations", len(alone)),
        ("regret_by_single_launches", 1 - winner / speeds[best] if winner else None),
    ]
    confirmed = confirmations_in(study)
    for plan_id in dict.fromkeys(row["plan_id"] for row in log.of("train")):
        trained = [float(r["tokens_per_s"]) for r in log.of("train", plan_id)]
        own = [r.tokens_per_s for r in confirmed if r.plan_id == plan_id and r.tokens_per_s]
        own = own or [r.tokens_per_s for r in load_study(study).records if r.plan_id == plan_id]
        name = log.of("train", plan_id)[0]["plan"]
        figures.append(
            (f"reported / trained, {name}", statistics.mean(own) / statistics.mean(trained))
        )
        figures.append((f"spread of training runs, {name}", max(trained) / min(trained) - 1))
    with (RESULTS / "live_figures.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["figure", "value"])
        writer.writerows(figures)
    for name, value in figures:
        print(f"{name}: {value if value is None else round(value, 4)}")


def run(*command: str) -> None:
    subprocess.run(command, check=True, cwd=ROOT)


if __name__ == "__main__":
    main()
