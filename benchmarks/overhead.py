"""What the runner adds to a bare training loop on the same engine, in milliseconds and percent.

    python benchmarks/overhead.py [--pairs 4] [--out benchmarks/results/overhead.csv]

Two CPU ranks, DeepSpeed ZeRO-2 and FSDP2. Each pair is a launch of the runner's trial (A) and one
of the bare loop (B, see bare_loop.py), in the order A B A B, with the same model, sequences,
attention, loss and numerics. A launch's figure is the median of its counted steps, slowest rank.
The overhead is the median over pairs of A - B; beside it stands how far launches of one kind lie
apart, which is what a single pair could not tell from an overhead.

Run it on an idle machine: it refuses above a load of 1, unless told.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from autotune.plan import Engine, Plan
from autotune.spec.model import load_model
from autotune.spec.workload import Workload
from autotune.trial.launch import Limits, rank_environment, run_launch
from autotune.trial.native_ops import build_native_ops
from autotune.trial.protocol import (
    REQUEST_FILE,
    Measurement,
    ModelSource,
    Outcome,
    Request,
    Rung,
    write_message,
)

RANKS = 2
TARGET = 0.03
LIMIT_S = 600
RESULTS = Path(__file__).parent / "results" / "overhead.csv"
PLANS = {
    "zero2": Plan(strategy="zero2", engine=Engine.DEEPSPEED, zero_stage=2, dp_shard=RANKS),
    "fsdp2": Plan(strategy="fsdp2", engine=Engine.FSDP2, dp_shard=RANKS),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """Medians of one launch."""

    engine: str
    pair: int
    loop: str
    """``runner`` or ``bare``."""
    grad_accum_steps: int
    step_s: float
    tokens_per_step: int
    """Mean over the counted steps, over all ranks: equal where both read the same sequences."""
    load_1min: float


def main() -> int:
    args = parse_arguments()
    load = os.getloadavg()[0]
    if load > args.max_load:
        sys.exit(
            f"The load is {load:.2f}: this would measure other programs. --max-load allows it."
        )
    launches: list[Launch] = []
    with tempfile.TemporaryDirectory() as folder:
        for pair in range(args.pairs):
            for engine in args.engines:
                for loop, start in (("runner", run_runner), ("bare", run_bare)):
                    place = Path(folder) / f"{engine}-{loop}-{pair}"
                    request = make_request(engine, args, place)
                    build_native_ops(request, place)
                    found = start(request, place)
                    load = os.getloadavg()[0]
                    launches += [
                        Launch(
                            engine=engine,
                            pair=pair,
                            loop=loop,
                            grad_accum_steps=accumulation,
                            step_s=step_s,
                            tokens_per_step=tokens,
                            load_1min=load,
                        )
                        for accumulation, (step_s, tokens) in found.items()
                    ]
                    shown = ", ".join(f"{a}: {s * 1000:.1f} ms" for a, (s, _) in found.items())
                    print(f"{engine} {loop} {pair}: step at accumulation {shown}", flush=True)
    check_same_work(launches)
    write_csv(launches, args.out)
    return report(launches)


def make_request(engine: str, args: argparse.Namespace, folder: Path) -> Request:
    model = load_model("tiny-qwen3")
    return Request(
        launch_id=folder.name,
        mode="trial",
        model=ModelSource(name=model.name, config=model.hf_config),
        plan=PLANS[engine].to_dict(),
        workload=Workload(
            seq_len=args.seq_len, global_batch_size=args.micro_batch_size * RANKS * 2
        ),
        device="cpu",
        out_dir=str(folder),
        rungs=[Rung(micro_batch_size=args.micro_batch_size, grad_accum_steps=2)],
        # As many steps in both loops: the clock decides nothing.
        measurement=Measurement(warmup_steps=2, min_steps=args.steps, max_steps=args.steps),
    )


def run_runner(request: Request, folder: Path) -> dict[int, tuple[float, int]]:
    """Return the runner's median step and tokens, by accumulation."""
    ended = run_launch(request, folder, Limits(deadline_s=LIMIT_S, hang_s=LIMIT_S))
    if ended.outcome is not Outcome.OK:
        sys.exit(f"the runner ended with {ended.outcome}: {ended.message}")
    parts = [result.rungs[0].accumulations for result in ended.results]
    return {
        ranks[0].grad_accum_steps: (
            slowest_median([rank.step_s for rank in ranks]),
            round(statistics.mean(ranks[0].valid_tokens)),
        )
        for ranks in zip(*parts, strict=True)
    }


def run_bare(request: Request, folder: Path) -> dict[int, tuple[float, int]]:
    """Return the bare loop's median step and tokens, by accumulation."""
    folder.mkdir(parents=True, exist_ok=True)
    write_message(request, folder / REQUEST_FILE)
    variables = rank_environment(request, folder, f"bare-{os.getpid()}-{folder.name}", RANKS)
    program = [sys.executable, str(Path(__file__).parent / "bare_loop.py")]
    ranks = []
    for number in range(RANKS):
        with (folder / f"rank-{number}.log").open("wb") as log:
            ranks.append(
                subprocess.Popen(
                    [*program, str(folder / REQUEST_FILE)],
                    env=variables | {"RANK": str(number), "LOCAL_RANK": str(number)},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        codes = [rank.wait(timeout=LIMIT_S) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    if any(codes):
        last = (folder / "rank-0.log").read_text(errors="replace")[-2000:]
        sys.exit(f"the bare loop ended with {codes}:\n{last}")
    parts = [
        json.loads((folder / f"rank-{number}.bare.json").read_text()) for number in range(RANKS)
    ]
    return {
        found[0]["grad_accum_steps"]: (
            slowest_median([rank["step_s"] for rank in found]),
            round(sum(statistics.mean(rank["tokens"]) for rank in found)),
        )
        for found in zip(*parts, strict=True)
    }


def slowest_median(series: list[list[float]]) -> float:
    """Return the median over steps of the slowest rank's time."""
    return statistics.median(max(step) for step in zip(*series, strict=True))


def check_same_work(launches: list[Launch]) -> None:
    for launch in launches:
        others = {
            other.tokens_per_step
            for other in launches
            if other.grad_accum_steps == launch.grad_accum_steps
        }
        if len(others) != 1:
            sys.exit(f"the loops read different sequences: {sorted(others)} tokens a step")


def write_csv(launches: list[Launch], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(launches[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(launch) for launch in launches)


def report(launches: list[Launch]) -> int:
    """Print the comparison; exit 1 where an overhead at steps of 0.5 s and more is above 3%."""
    print(f"\n{'engine':<8}{'accum':>6}{'bare ms':>10}{'added ms':>10}{'added':>8}{'spread':>18}")
    above = False
    for engine, accumulation in dict.fromkeys((x.engine, x.grad_accum_steps) for x in launches):
        held = [x for x in launches if (x.engine, x.grad_accum_steps) == (engine, accumulation)]
        runner = [x.step_s for x in held if x.loop == "runner"]
        bare = [x.step_s for x in held if x.loop == "bare"]
        added = statistics.median(a - b for a, b in zip(runner, bare, strict=True))
        base = statistics.median(bare)
        spreads = [(max(x) - min(x)) / statistics.median(x) for x in (runner, bare)]
        spread = " / ".join(f"{value:.1%}" for value in spreads)
        print(
            f"{engine:<8}{accumulation:>6}{base * 1000:>10.1f}{added * 1000:>10.1f}"
            f"{added / base:>8.1%}{spread:>18}"
        )
        above |= base >= 0.5 and added / base > TARGET
    print("spread: between launches of the runner / of the bare loop, (max - min) / median")
    print(
        f"target: at most {TARGET:.0%} at steps of 0.5 s and more: {'missed' if above else 'met'}"
    )
    return int(above)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", type=lambda text: text.split(","), default=list(PLANS))
    parser.add_argument("--pairs", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=12, help="counted steps, default %(default)s")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--max-load", type=float, default=1.0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
