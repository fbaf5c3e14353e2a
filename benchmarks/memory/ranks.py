"""Measure what real CPU ranks allocate, and lay the estimates beside it.

    python benchmarks/memory/ranks.py --measure    # adds the rows that are missing
    python benchmarks/memory/ranks.py              # estimates of the rows there are, and the errors
    python benchmarks/memory/ranks.py --tensor-parallel --measure    # those of split models

Every configuration trains two steps, evaluates and gathers its weights through the project's own
runner; the peak is the allocator's own account of the rank that needs most.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ranks_cases import MODELS, Case, cases, tensor_parallel_cases
from ranks_errors import COMPARED, figures, instant_errors, row_of, trace_all, write
from ranks_measured import measured_row, read_rows, write_rows

from autotune.trial.launch import rank_environment
from autotune.trial.native_ops import build_native_ops
from autotune.trial.protocol import REQUEST_FILE, ModelSource, Request, write_message

_HERE = Path(__file__).parent
MEASURED = _HERE / "ranks_measured.csv"
RESULT = _HERE / "ranks.csv"
TENSOR_PARALLEL = _HERE / "ranks_tp_measured.csv", _HERE / "ranks_tp.csv"
"""The same two of split models."""
_AT_ONCE = 15
"""Launches of one worker process, which pays for the imports once."""


def request_of(case: Case, folder: Path) -> Request:
    """Return the launch of a case."""
    return Request(
        launch_id=folder.name,
        mode="trial",
        model=ModelSource(name=case.architecture, config=MODELS[case.architecture]),
        plan=case.plan.to_dict(),
        workload=case.workload,
        device="cpu",
        out_dir=str(folder),
    )


def measure(missing: list[Case], every: list[Case], file: Path, work: Path) -> None:
    """Run cases and write each as it finishes, in the order of all."""
    for first in range(0, len(missing), _AT_ONCE):
        batch = {}
        for case in missing[first : first + _AT_ONCE]:
            folder = work / case.name.replace("/", "-")
            folder.mkdir(parents=True, exist_ok=True)
            request = request_of(case, folder)
            build_native_ops(request, folder)
            write_message(request, folder / REQUEST_FILE)
            batch[folder] = case
        command = [sys.executable, str(_HERE / "ranks_worker.py"), *map(str, batch)]
        environment = rank_environment(request, work, "ranks", 1) | {"PYTHONSAFEPATH": ""}
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, text=True
        ) as worker:
            assert worker.stdout is not None
            for line in worker.stdout:
                print(line, end="", flush=True)
                name, how, _ = line.split("\t")
                case = batch[Path(name)]
                if how == "ok":
                    _add(measured_row(case.name, Path(name), case.plan.world_size), every, file)


def _add(row: dict[str, object], every: list[Case], file: Path) -> None:
    rows = (dict(read_rows(file)) if file.exists() else {}) | {str(row["name"]): row}
    write_rows(file, (rows[case.name] for case in every if case.name in rows))


def compare(every: list[Case], file: Path, only: str = "") -> list[dict[str, Any]]:
    """Estimate what was measured, print the errors; return the rows."""
    measured = read_rows(file)
    chosen = [case for case in every if case.name in measured and only in case.name]
    trace_all(chosen)
    rows = [row_of(case, measured[case.name]) for case in chosen]
    for split in ("tune", "held_out"):
        own = [row for row in rows if row["split"] == split]
        _print(f"{split}, gross", [row["error"] for row in own])
        _print(f"{split}, net of buckets", [row["error_net_of_buckets"] for row in own])
    for engine in dict.fromkeys(row["engine"] for row in rows):
        for split in ("tune", "held_out"):
            own = [r["error"] for r in rows if r["engine"] == engine and r["split"] == split]
            _print(f"{split} {engine}", own)
    for name in COMPARED:
        _print(f"instant {name}", instant_errors(rows, name))
    return rows


def _print(what: str, errors: list[float]) -> None:
    if errors:
        found = figures(errors)
        shown = "  ".join(f"{k} {v:.1%}" for k, v in found.items() if k != "count")
        print(f"{what:36s} n {found['count']:3.0f}  {shown}")


def main() -> None:
    """Measure what is missing, if asked; write the table and print the errors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", action="store_true", help="run the cases that have no row")
    parser.add_argument("--only", default="", help="part of the name of the cases to take")
    parser.add_argument("--work", type=Path, default=None, help="keep the ranks' files here")
    parser.add_argument("--tensor-parallel", action="store_true", help="take the split models")
    arguments = parser.parse_args()
    every, (file, result) = cases(), (MEASURED, RESULT)
    if arguments.tensor_parallel:
        every, (file, result) = tensor_parallel_cases(), TENSOR_PARALLEL
    if arguments.measure:
        done = read_rows(file) if file.exists() else {}
        missing = [c for c in every if c.name not in done and arguments.only in c.name]
        with tempfile.TemporaryDirectory() as temporary:
            measure(missing, every, file, arguments.work or Path(temporary))
    rows = compare(every, file, arguments.only)
    if not arguments.only:
        write(rows, result)


if __name__ == "__main__":
    main()
