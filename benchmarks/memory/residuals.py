"""Learn how far real memory lies from the predicted, from the committed records.

    python benchmarks/memory/residuals.py            # the coverage of what is committed
    python benchmarks/memory/residuals.py --write    # autotune/memory/residuals.json anew

Two kinds of records: the allocator's account of real CPU ranks (`ranks.csv`), and the trials of the
committed demonstration, whose memory is that of processes. The spreads are those under which the
records are likeliest; what records of one model or none cannot tell is stated. Coverage is that of
the 90% interval on each architecture, from the records of the others alone, spreads included.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from autotune.memory import estimate_memory_table, residuals
from autotune.memory.residuals import Residuals, Row, Ruler, Spread, engine_label
from autotune.memory.student import student_quantile_95
from autotune.spec.hardware import load_hardware
from autotune.spec.model import load_model
from autotune.spec.workload import Workload
from autotune.trial.record import TrialRecord
from autotune.units import MIB

RANKS = Path(__file__).with_name("ranks.csv")
DEMO = Path(__file__).parents[2] / "reports" / "examples" / "demo-2-cpu-ranks"
RESULT = Path(residuals.__file__).with_name("residuals.json")

GRID = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12)
FITTED = dict.fromkeys(("shared", "library", "group", "model", "noise"), GRID)
"""Effects whose spread is chosen, and the values tried."""
FITTED_OF_ONE_MODEL = dict.fromkeys(("shared", "library", "group", "noise"), GRID) | {
    "fixed": (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
}
"""Of records of one model on one machine, which tell nothing of the spreads of these."""
SWEEPS = 4
START = Spread(
    shared=0.02, library=0.02, group=0.02, model=0.02, machine=0.005, fixed=0.0,
    machine_fixed=0.0, noise=0.02, fixed_bytes=0, degrees=3,
)  # fmt: skip
STATED = {
    # Of the allocator's reserved bytes: what CPU ranks show, and as much again for rounding,
    # fragmentation and workspaces, which they do not.
    Ruler.CUDA: Spread(
        shared=0.05, library=0.03, group=0.03, model=0.03, machine=0.03, fixed=1.0,
        machine_fixed=0.0, noise=0.03, fixed_bytes=64 * MIB, degrees=4,
    ),
    # Beside tensors a process grows by stacks, buffers of gloo and code, tens of MiB here, and so
    # many more or less elsewhere.
    Ruler.CPU: Spread(
        shared=0.1, library=0.05, group=0.05, model=0.05, machine=0.1, fixed=1.0,
        machine_fixed=0.5, noise=0.05, fixed_bytes=64 * MIB, degrees=4,
    ),
}  # fmt: skip
SOURCES = {
    Ruler.CUDA: "assumed: no CUDA run was measured",
    Ruler.CPU: "the demonstration's trials on 2 CPU ranks",
    Ruler.CPU_ALLOCATOR: "real CPU ranks (benchmarks/memory/ranks.csv)",
}


def ranks_rows() -> list[Row]:
    """Return the allocator's account of real ranks beside its prediction."""
    with RANKS.open(newline="") as file:
        return [_rank_row(row) for row in csv.DictReader(file)]


def _rank_row(row: dict[str, str]) -> Row:
    # architecture/strategy/ranks/cp/sequence/batch/accumulation/packing/recompute[/lora]
    words = row["name"].split("/")
    predicted, real = float(row["predicted"]), float(row["measured"])
    return Row(
        engine=_engine_of(words[1]),
        recompute=words[8],
        model=words[0],
        predicted_bytes=round(predicted),
        log_ratio=round(float(np.log(real / predicted)), 4),
        here=False,
    )


def _engine_of(strategy: str) -> str:
    name = strategy.partition("_")[0]
    return "fsdp2" if name == "hsdp" else name


def demo_rows() -> list[Row]:
    """Return the demonstration's trials, predicted anew."""
    study = json.loads((DEMO / "study.json").read_text())
    model = load_model(study["model"]["name"])
    workload = Workload.model_validate(study["workload"])
    limit = study["memory_limit_bytes"]
    rows = []
    for line in (DEMO / "trials.jsonl").read_text().splitlines():
        record = TrialRecord.from_dict(json.loads(line))
        plan = record.plan_object
        ran_out = record.outcome == "oom"
        if not ran_out and record.outcome != "ok":
            continue
        hardware = load_hardware("cpu", plan.world_size, limit)
        table = estimate_memory_table(model, workload, [plan], hardware)
        predicted = round(float(table.total_bytes[0]))
        real = limit if ran_out else record.peak_reserved_bytes
        rows.append(
            Row(
                engine=engine_label(plan),
                recompute=str(plan.recompute),
                model=model.name,
                predicted_bytes=predicted,
                log_ratio=round(float(np.log(real / predicted)), 4),
                exceeded=ran_out,
                here=False,
            )
        )
    return rows


def fit(
    rows: Sequence[Row],
    start: Spread = START,
    fitted: Mapping[str, Sequence[float]] = FITTED,
) -> Spread:
    """Return the spreads under which the rows are likeliest, one effect at a time.

    The largest twentieth counts as the 95th percentile: most errors are far below it, and one in
    twenty may lie outside the interval.
    """
    rows = _winsorised(rows)
    best = replace(start, degrees=max(start.degrees, len({row.model for row in rows}) - 1))
    height = Residuals(rows, best, "").log_likelihood()
    for _ in range(SWEEPS):
        before = best
        for name, values in fitted.items():
            for value in values:
                tried = replace(best, **{name: value})
                found = Residuals(rows, tried, "").log_likelihood()
                if found > height:
                    best, height = tried, found
        if best == before:
            break
    return best


def _winsorised(rows: Sequence[Row]) -> list[Row]:
    bound = float(np.quantile([abs(row.log_ratio) for row in rows], 0.95))
    return [replace(row, log_ratio=max(-bound, min(bound, row.log_ratio))) for row in rows]


def held_out(rows: Sequence[Row]) -> list[tuple[Row, bool]]:
    """Return each row with whether the others' records foresaw it, an architecture at a time."""
    found = []
    for architecture in dict.fromkeys(row.model for row in rows):
        known = [row for row in rows if row.model != architecture]
        asked = [row for row in rows if row.model == architecture]
        found += list(zip(asked, foreseen(known, asked, fit(known)), strict=True))
    return found


def foreseen(known: Sequence[Row], asked: Sequence[Row], spread: Spread) -> list[bool]:
    """Tell of each row whether it lies in the 90% interval that the known ones give."""
    same_machine = [replace(row, here=True) for row in known]
    bias, scale, degrees = Residuals(same_machine, spread, "").predict_many(
        [row.engine for row in asked],
        [row.recompute for row in asked],
        asked[0].model,
        np.array([row.predicted_bytes for row in asked], float),
    )
    real = np.array([row.log_ratio for row in asked])
    inside = np.abs(real - bias) <= student_quantile_95(degrees) * scale
    return [bool(value) for value in inside]


def entry(ruler: Ruler, rows: Sequence[Row], spread: Spread) -> dict[str, Any]:
    """Return what the data file holds of a ruler."""
    source = SOURCES[ruler] if rows or ruler is Ruler.CUDA else "assumed"
    return {
        "source": source,
        "spread": asdict(spread),
        "rows": [
            [r.engine, r.recompute, r.model, r.predicted_bytes, r.log_ratio, r.exceeded]
            for r in rows
        ],
    }


def write(entries: dict[Ruler, dict[str, Any]], file: Path) -> None:
    """Write the data file, a row a line."""
    parts = []
    for ruler, values in entries.items():
        rows = ",\n".join(f"   {json.dumps(row)}" for row in values["rows"])
        parts.append(
            f' "{ruler}": {{\n  "source": {json.dumps(values["source"])},\n'
            f'  "spread": {json.dumps(values["spread"])},\n  "rows": [\n{rows}\n  ]\n }}'
        )
    file.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the data file that ships")
    args = parser.parse_args()
    ranks = ranks_rows()
    ranks_spread = fit(ranks)
    print(f"{len(ranks)} records of {len({r.model for r in ranks})} architectures: {ranks_spread}")
    outcome = held_out(ranks)
    for architecture in dict.fromkeys(row.model for row, _ in outcome):
        own = [inside for row, inside in outcome if row.model == architecture]
        print(f"  {architecture}: {sum(own)} of {len(own)} inside the 90% interval")
    share = sum(inside for _, inside in outcome) / len(outcome)
    print(f"coverage on held-out architectures: {share:.1%}")
    if args.write:
        demo = demo_rows()
        demo_spread = fit(demo, STATED[Ruler.CPU], FITTED_OF_ONE_MODEL)
        write(
            {
                Ruler.CUDA: entry(Ruler.CUDA, [], STATED[Ruler.CUDA]),
                Ruler.CPU: entry(Ruler.CPU, demo, demo_spread),
                Ruler.CPU_ALLOCATOR: entry(Ruler.CPU_ALLOCATOR, ranks, ranks_spread),
            },
            RESULT,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
