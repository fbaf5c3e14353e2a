"""How long the report of a large study takes to write, and its page to open in Chromium.

    python benchmarks/report_speed.py [--trials 5000] [--runs 5] [--out CSV]

The records are made up for this measurement, through the same `Plan`, `TrialRecord` and
`RecordStore` a search uses; nothing is claimed about training. Prints one line a figure, the median
of the runs, and writes `benchmarks/results/report_speed.csv`, with the machine's load beside it: a
busy machine is slower. Times of the page are from the start
of the navigation, each run in a fresh tab of one browser, the file on disk:

- load: the load event, every script of the page run (`performance.timing.loadEventEnd`)
- first paint: `first-contentful-paint`, the answer and the first rows of the table are there
- first chart: it is drawn; the charts' library runs after the load event
- new_browser: the same, once, in a browser that has only just been started
- filter, sort: from the input to the frame after it, all rows
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from autotune.plan import Engine, Plan, Recompute  # noqa: E402
from autotune.trial.protocol import Outcome  # noqa: E402
from autotune.trial.record import TrialRecord  # noqa: E402
from autotune.trial.store import RecordStore  # noqa: E402
from benchmarks.chromium import EXECUTABLE, Page, chromium_page  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "report_speed.csv"
_MIB = 2**20
_STRATEGIES = (
    ("ddp", Engine.DDP, 0),
    ("zero1", Engine.DEEPSPEED, 1),
    ("zero2", Engine.DEEPSPEED, 2),
    ("zero3", Engine.DEEPSPEED, 3),
    ("fsdp2", Engine.FSDP2, 0),
    ("fsdp2_no_reshard", Engine.FSDP2, 0),
)
_OPENING = ("load_s", "first_paint_s", "first_chart_s")
_TIMES = """(() => {
  const navigation = performance.getEntriesByType("navigation")[0];
  const paint = performance.getEntriesByName("first-contentful-paint")[0];
  return {load_s: navigation.loadEventEnd / 1000, first_paint_s: paint.startTime / 1000};
})()"""
_FIRST_CHART = """new Promise((done) => {
  const look = () => document.querySelector(".chart .main-svg")
    ? done(performance.now() / 1000) : setTimeout(look, 10);
  look();
})"""
_FRAME = "new Promise((done) => requestAnimationFrame(() => setTimeout(done)))"


def made_up_records(count: int, seed: int = 0) -> Iterator[TrialRecord]:
    """Yield records of distinct plans, three a launch, about one in six out of memory."""
    rng = random.Random(seed)
    for number in range(count):
        strategy, engine, stage = _STRATEGIES[number // 3 % len(_STRATEGIES)]
        plan = Plan(
            strategy=strategy,
            engine=engine,
            zero_stage=stage,
            reshard_after_forward=strategy != "fsdp2_no_reshard",
            dp_replicate=64 if engine is Engine.DDP else 1,
            dp_shard=1 if engine is Engine.DDP else 64,
            micro_batch_size=2 ** rng.randrange(6),
            grad_accum_steps=2 ** rng.randrange(6),
            recompute=rng.choice(list(Recompute)),
            bucket_elements=number + 1,  # so that no two are one plan
        )
        yield _record(plan, number // 3 + 1, rng)


def _record(plan: Plan, launch: int, rng: random.Random) -> TrialRecord:
    common = {
        "launch": launch,
        "plan_id": plan.id,
        "plan": plan.to_dict(),
        "predicted_bytes": rng.randrange(10_000, 80_000) * _MIB,
        "predicted_step_s": rng.uniform(1, 5),
        "predicted_tokens_per_s": rng.uniform(10_000, 90_000),
        "predicted_verdict": "fits",
        "launch_s": 25.0,
        "started_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(1_800_000_000 + 30 * launch)),
        "log_dir": f"launches/{launch:04d}-{plan.strategy}",
    }
    if rng.random() < 1 / 6:
        message = "at accumulation 1: no memory for 16777216 bytes more"
        return TrialRecord(outcome=Outcome.OOM, message=message, **common)
    step_s = rng.uniform(1, 5)
    memory = rng.randrange(10_000, 80_000) * _MIB
    return TrialRecord(
        outcome=Outcome.OK,
        message="",
        tokens_per_s=64 * 2048 / step_s,
        step_s=step_s,
        step_s_low=step_s * 0.98,
        step_s_high=step_s * 1.02,
        measured_accum_steps=(1, plan.grad_accum_steps),
        peak_allocated_bytes=memory,
        peak_reserved_bytes=memory + 500 * _MIB,
        alloc_retries=0,
        step_times_s=tuple(step_s * rng.gauss(1, 0.02) for _ in range(8)),
        **common,
    )


def write_study(folder: Path, count: int) -> None:
    """Write a study folder as a search of `count` trials leaves it, a tenth more plans refused."""
    store = RecordStore(folder)
    records = store.add(made_up_records(count))
    (folder / "study.json").write_text(
        json.dumps({"schema_version": 1, "model": {"name": "made up for a measurement"}})
    )
    refused = [
        {"plan": record.plan | {"cp": 3}, "code": "AT106", "reason": "cp=3 does not divide 8 heads"}
        for record in records[: count // 10]
    ]
    summary = {
        "launches": records[-1].launch,
        "rejected": refused,
        "stopped_because": "every configuration of the space was tried",
    }
    (folder / "summary.json").write_text(json.dumps(summary))


def time_report(folder: Path) -> dict[str, float]:
    """Return the seconds `autotune report` takes, starting Python included: clock and processor."""
    started, used = time.monotonic(), _children_cpu_s()
    subprocess.run(
        [sys.executable, "-m", "autotune", "report", str(folder)],
        cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return {
        "report_s": time.monotonic() - started,
        "report_cpu_s": _children_cpu_s() - used,
    }


def _children_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def time_page(page: Page, address: str) -> dict[str, float]:
    """Open the page once; return its times in seconds."""
    page.go(address)
    times = dict(page.run(_TIMES)) | {"first_chart_s": float(page.run(_FIRST_CHART))}
    times["filter_s"] = _timed(
        page,
        "const box = document.getElementById('trials-find'); box.value = 'zero3 recompute';"
        "box.dispatchEvent(new Event('input'));",
    )
    times["sort_s"] = _timed(page, "document.querySelectorAll('#trials th button')[7].click();")
    return times


def _timed(page: Page, steps: str) -> float:
    code = f"const start = performance.now(); {steps} await {_FRAME};"
    return float(page.run(f"(async () => {{ {code} return performance.now() - start; }})()")) / 1000


def main() -> int:
    """Measure, print, and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=5000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if EXECUTABLE is None:
        sys.exit("No chromium here (Debian: apt-get install chromium).")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "study"
        folder.mkdir()
        write_study(folder, args.trials)
        runs: dict[str, list[float]] = {}
        for _ in range(args.runs):
            _append(runs, time_report(folder))
        html = folder / "report.html"
        with chromium_page(Path(name) / "profile") as page:
            page.window(1280)
            first = time_page(page, html.as_uri())
            _append(runs, {f"new_browser_{figure}": first[figure] for figure in _OPENING})
            for _ in range(args.runs):
                _append(runs, time_page(page, html.as_uri()))
            version = page.version
        size = html.stat().st_size
    _write(args.out, args.trials, runs, size, version)
    return 0


def _append(runs: dict[str, list[float]], figures: dict[str, float]) -> None:
    for figure, seconds in figures.items():
        runs.setdefault(figure, []).append(seconds)


def _write(out: Path, trials: int, runs: dict[str, list[float]], size: int, version: str) -> None:
    load = round(os.getloadavg()[0], 2)
    where = f"{platform.machine()}, {os.cpu_count()} cores, {version}"
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            [
                "figure",
                "trials",
                "median_s",
                "min_s",
                "max_s",
                "runs",
                "page_bytes",
                "load_1min",
                "where",
            ]
        )
        for figure, seconds in runs.items():
            middle = statistics.median(seconds)
            print(f"{figure:<26} {middle:7.3f} s  ({min(seconds):.3f} to {max(seconds):.3f})")
            row = [round(value, 4) for value in (middle, min(seconds), max(seconds))]
            writer.writerow(
                [figure.removesuffix("_s"), trials, *row, len(seconds), size, load, where]
            )
    print(f"{trials} trials, page of {size / 1e6:.1f} MB, {where}; wrote {out}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
