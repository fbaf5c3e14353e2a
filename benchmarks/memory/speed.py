"""How fast memory is estimated: a million plans as arrays, and whole commands.

    python benchmarks/memory/speed.py [--runs 3] [--out benchmarks/results/memory_speed.csv]

Commands are timed as fresh processes, imports included. The local model is one that nothing knows:
its first estimate traces it (with the training stack installed), the next reads what was kept.
CPU seconds are means, preparation included: far below the median, something else was at work.
Exits 1 where a median is above its target.
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
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from autotune.memory import estimate_memory_table
from autotune.memory.columns import PlanColumns
from autotune.memory.knowledge import model_key
from autotune.memory.residuals import Residuals, Ruler
from autotune.memory.verdict import judge_table
from autotune.plan import Recompute
from autotune.planner import CP_DEGREES, make_plan
from autotune.rules import check_plan
from autotune.spec.hardware import HardwareSpec, load_hardware
from autotune.spec.model import ModelSpec, load_model
from autotune.spec.strategy import load_strategies
from autotune.spec.workload import Workload

RESULTS = Path(__file__).parents[1] / "results" / "memory_speed.csv"
PLANS = 1_000_000
MODEL = "qwen3-8b"
HARDWARE = ["--gpus", "8", "--gpu-type", "h100-sxm"]
LOCAL_MODEL = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 50176,
    "hidden_size": 3072, "intermediate_size": 8448, "num_hidden_layers": 30,
    "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
CONFIG = (
    "base_model: {model}\nsequence_len: 4096\nsample_packing: true\nmicro_batch_size: 2\n"
    "gradient_accumulation_steps: 4\nlearning_rate: 1e-5\nbf16: true\n"
    "gradient_checkpointing: true\ndeepspeed: zero2.json\n"
    "datasets:\n  - {{path: a.jsonl, type: completion}}\n"
)
NO_TORCH = (
    "import sys\nfrom autotune.cli import main\n"
    "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
    "heavy = {'torch', 'transformers', 'accelerate', 'deepspeed'} & set(sys.modules)\n"
    "assert not heavy, heavy\n"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    slow = 0
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, args.out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["what", "runs", "median_s", "max_s", "cpu_s", "target_s", "load_1min"])
        for what, target, run in timings(Path(folder)):
            before = cpu_s()
            seconds = [run() for _ in range(args.runs)]
            used = (cpu_s() - before) / args.runs
            median, largest, load = statistics.median(seconds), max(seconds), os.getloadavg()[0]
            row = [what, args.runs, *(f"{value:.3f}" for value in (median, largest, used))]
            writer.writerow([*row, target, f"{load:.2f}"])
            print(
                f"{median:.2f} s median, {largest:.2f} s max, {used:.2f} s of CPU, target {target} "
                f"s: {what}"
            )
            slow += median > target
    return int(slow > 0)


def cpu_s() -> float:
    """Return the CPU seconds of this process and of the children that ended."""
    now = os.times()
    return now.user + now.system + now.children_user + now.children_system


def timings(folder: Path) -> list[tuple[str, float, Callable[[], float]]]:
    """Return what is timed, its target in seconds, and a function that does it once."""
    config = folder / "known.yml"
    config.write_text(CONFIG.format(model=MODEL))
    local = folder / "model"
    local.mkdir()
    (local / "config.json").write_text(json.dumps(LOCAL_MODEL))
    unknown = folder / "unknown.yml"
    unknown.write_text(CONFIG.format(model=local))
    estimate(config, folder / "any", check=True)  # warms the file cache, proves that no torch comes

    kept = folder / "kept"

    def first() -> float:
        nonlocal kept
        kept = Path(tempfile.mkdtemp(dir=folder))
        return estimate(unknown, kept)

    def again() -> float:
        return estimate(unknown, kept)

    return [
        (f"score {PLANS:,} plans of {MODEL}", 5.0, score_million),
        (f"estimate of {MODEL}, no torch imported", 1.0, lambda: estimate(config, folder / "any")),
        ("first estimate of a new config.json", 20.0, first),
        ("the same again", 1.0, again),
    ]


def estimate(config: Path, cache: Path, *, check: bool = False) -> float:
    """Run `autotune estimate` as a fresh process; a failure is not a speed."""
    program = ["-c", NO_TORCH] if check else ["-m", "autotune"]
    command = [sys.executable, *program, "estimate", str(config), *HARDWARE]
    environment = os.environ | {"AUTOTUNE_CACHE_DIR": str(cache), "AUTOTUNE_KNOWLEDGE": "off"}
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    return time.perf_counter() - start


def score_million() -> float:
    """Estimate a million plans, judge whether each fits, and find the fullest that do."""
    model, workload = load_model(MODEL), Workload()
    hardware = load_hardware("h100-sxm", 8)
    columns = plans_of(model, workload, hardware)
    estimate_memory_table(model, workload, [columns.plan(0)], hardware)  # reads the profiles
    start = time.perf_counter()
    table = estimate_memory_table(model, workload, columns, hardware)
    judged = judge_table(table, hardware, Residuals.known(Ruler.CUDA), model_key(model))
    fitting = np.flatnonzero(judged.fit_probability >= 0.9)
    best = fitting[np.argsort(table.total_bytes[fitting])[-10:]]
    shown = [(columns.plan(int(i)), judged.peak(int(i))) for i in best]
    seconds = time.perf_counter() - start
    assert len(columns) == PLANS and len(shown) == 10
    return seconds


def plans_of(model: ModelSpec, workload: Workload, hardware: HardwareSpec) -> PlanColumns:
    """Return a million plans: every legal layout with many splits of the batch."""
    layouts = [
        plan
        for strategy in load_strategies()
        for cp in CP_DEGREES
        for recompute in Recompute
        if not check_plan(
            plan := make_plan(
                strategy, hardware, cp=cp, recompute=recompute,
                grad_accum_steps=workload.global_batch_size * cp // hardware.num_gpus,
            ),
            model, workload, hardware,
        )
    ]  # fmt: skip
    each = -(-PLANS // len(layouts))
    side = int(each**0.5) + 1
    batch, steps = np.divmod(np.arange(each), side)
    parts = []
    left = PLANS
    for plan in layouts:
        numbers = np.repeat(PlanColumns.of([plan]).numbers, min(each, left), axis=0)
        numbers[:, 0], numbers[:, 1] = batch[: len(numbers)] + 1, steps[: len(numbers)] + 1
        parts.append((plan, numbers))
        left -= len(numbers)
    return PlanColumns.joined(parts)


if __name__ == "__main__":
    sys.exit(main())
