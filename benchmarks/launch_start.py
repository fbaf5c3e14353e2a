"""Time from asking for a trial to its first step: ranks started cold, and forked.

    python benchmarks/launch_start.py --rounds 5

Each round starts the same trial of tiny-qwen3 on two CPU ranks cold, then forked, A B A B, so that
drift of the machine meets both alike. The fork server is started once before: what that takes is
in its own column, and paid once a search. The time is the ranks' own (`RankResult.ready_s`, slowest
rank): from before the first rank is started to the first step's start. Rows go to
`results/launch_start.csv`; the last lines say whether the ratio of the medians reaches its bound.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import statistics
import sys
import tempfile
from pathlib import Path

from autotune.plan import Engine, Plan
from autotune.spec.model import load_model
from autotune.spec.workload import Workload
from autotune.trial.forkserver import ForkServer
from autotune.trial.launch import Limits, run_launch
from autotune.trial.native_ops import build_native_ops
from autotune.trial.protocol import Measurement, ModelSource, Outcome, Request, Rung

BOUND = 0.25
"""A forked launch takes at most this share of a cold one."""
RESULTS = Path(__file__).parent / "results" / "launch_start.csv"
COLUMNS = [
    "date", "engine", "round", "start", "imports_s", "ready_s", "launch_s", "server_imports_s",
    "load_1min",
]  # fmt: skip
PLANS = {
    "ddp": Plan(strategy="ddp", engine=Engine.DDP, dp_replicate=2),
    "zero1": Plan(strategy="zero1", engine=Engine.DEEPSPEED, zero_stage=1, dp_shard=2),
    "zero2": Plan(strategy="zero2", engine=Engine.DEEPSPEED, zero_stage=2, dp_shard=2),
    "zero3": Plan(strategy="zero3", engine=Engine.DEEPSPEED, zero_stage=3, dp_shard=2),
    "zero2_offload_optimizer": Plan(
        strategy="zero2_offload_optimizer",
        engine=Engine.DEEPSPEED,
        zero_stage=2,
        dp_shard=2,
        offload_optimizer=True,
    ),
    "fsdp2": Plan(strategy="fsdp2", engine=Engine.FSDP2, dp_shard=2),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engines", nargs="+", choices=PLANS, default=list(PLANS))
    parser.add_argument("--max-load", type=float, default=1.0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    load = os.getloadavg()[0]
    if load > args.max_load:
        sys.exit(
            f"The load is {load:.2f}: this would measure other programs. --max-load allows it."
        )
    rows = measure(args.engines, args.rounds)
    args.out.parent.mkdir(exist_ok=True)
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return report(rows, args.engines)


def measure(engines: list[str], rounds: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        ForkServer(Path(folder) / "server") as server,
    ):
        # Not counted: the server's start, and whatever a first launch finds cold in the kernel.
        for start in ("cold", "fork"):
            launch(engines[0], Path(folder) / f"before-{start}", start, server)
        for number in range(1, rounds + 1):
            for engine in engines:
                for start in ("cold", "fork"):
                    place = Path(folder) / f"{engine}-{number}-{start}"
                    row = launch(engine, place, start, server) | {"round": number}
                    rows.append(row)
                    print(f"{engine} {start}: {row['ready_s']:.2f} s to the first step", flush=True)
    return rows


def launch(engine: str, folder: Path, start: str, server: ForkServer) -> dict[str, object]:
    """Launch once; return the row."""
    model = load_model("tiny-qwen3")
    request = Request(
        launch_id=folder.name,
        mode="trial",
        model=ModelSource(name=model.name, config=model.hf_config),
        plan=PLANS[engine].to_dict(),
        workload=Workload(seq_len=256, global_batch_size=2),
        device="cpu",
        out_dir=str(folder),
        rungs=[Rung(micro_batch_size=1, grad_accum_steps=1)],
        measurement=Measurement(min_steps=1, max_steps=1),
    )
    build_native_ops(request, folder)
    load = os.getloadavg()[0]
    ended = run_launch(
        request,
        folder,
        Limits(deadline_s=600, hang_s=120),
        starter=server if start == "fork" else None,
    )
    started = {result.start for result in ended.results}
    if ended.outcome is not Outcome.OK or started != {start}:
        sys.exit(f"{engine}, {start}: {ended.outcome}, ranks {started}: {ended.message}")
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "engine": engine,
        "start": start,
        "imports_s": max(result.imports_s or 0.0 for result in ended.results),
        "ready_s": max(result.ready_s or 0.0 for result in ended.results),
        "launch_s": ended.elapsed_s,
        "server_imports_s": server.imports_s if start == "fork" else "",
        "load_1min": load,
    }


def report(rows: list[dict[str, object]], engines: list[str]) -> int:
    """Print the ratios; return 1 when one of them is over the bound."""
    short = False
    for engine in engines:
        medians = {}
        for start in ("cold", "fork"):
            own = [r["ready_s"] for r in rows if (r["engine"], r["start"]) == (engine, start)]
            medians[start] = statistics.median(own)  # type: ignore[type-var]
        ratio = medians["fork"] / medians["cold"]  # type: ignore[operator]
        short |= ratio > BOUND
        print(
            f"{engine}: {medians['cold']:.2f} s cold, {medians['fork']:.2f} s forked, ratio "
            f"{ratio:.3f}, at most {BOUND}: {'short' if ratio > BOUND else 'pass'}"
        )
    return int(short)


if __name__ == "__main__":
    sys.exit(main())
