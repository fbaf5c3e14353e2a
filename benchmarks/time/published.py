"""Predicted against published training speeds: MPT models on A100s, after one point of calibration.

    python benchmarks/time/published.py [--out benchmarks/time/published_predicted.csv]

`published/llm_foundry_a100.csv` restates llm-foundry's benchmark table, each row with its source.
A group has one sequence length and one mixed precision. Of each, the row in the middle (by model
size) sets one factor on time; the error counts over the others. Ranks are compared in groups of
five rows or more. Exits 1 where a figure is short.

What is not ours is stated as such: FSDP1's full shard runs as FSDP2 that reshards; MPT's MLP of two
matrices counts as a gated one of as many weights; ALiBi is a bias in the attention kernel.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

from autotune.plan import Engine, Plan, Recompute
from autotune.spec.hardware import HardwareSpec, load_hardware
from autotune.spec.model import ModelSpec, model_from_config
from autotune.spec.workload import Workload
from autotune.timing import TimeEstimate, estimate_time

HERE = Path(__file__).parent
TABLE = HERE / "published" / "llm_foundry_a100.csv"
RESULTS = HERE / "published_predicted.csv"
MEDIAN_TARGET, SPEARMAN_TARGET = 0.12, 0.9
LEAST_ROWS = 5
_GPUS = {"80": "a100-80gb", "40": "a100-40gb"}

Row = dict[str, str]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    with TABLE.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    groups: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["mixed_precision"], int(row["seq_len"])].append(row)
    errors: list[float] = []
    ranks: list[float] = []
    written = []
    for (precision, seq_len), group in sorted(groups.items()):
        estimates = [predict(row) for row in group]
        predicted = np.array([e.tokens_per_s / e.num_ranks for e in estimates])
        measured = np.array([float(row["tokens_per_s_per_gpu"]) for row in group])
        # The middle by model size, the first of several runs of it.
        order = sorted(range(len(group)), key=lambda n: (size_of(group[n]), n))
        point = order[len(order) // 2]
        factor = measured[point] / predicted[point]
        error = factor * predicted / measured - 1
        others = [float(e) for n, e in enumerate(error) if n != point]
        errors += others
        said = ""
        if len(group) >= LEAST_ROWS:
            ranks.append(spearman(predicted, measured))
            said = f", Spearman {ranks[-1]:.3f}"
        middle = statistics.median(map(abs, others)) if others else 0.0
        print(
            f"{precision:>8} {seq_len:>6} tokens: {len(group):>2} rows, factor {factor:.2f}, "
            f"median |error| {middle:.1%}{said}"
        )
        written += [
            row | {"predicted": f"{p:.1f}", "factor": f"{factor:.4f}", "error": f"{e:.4f}",
                   "calibrates": str(int(n == point))}
            | {name: f"{seconds:.4f}" for name, seconds in estimate.components.items()}
            for n, (row, p, e, estimate) in enumerate(
                zip(group, predicted, error, estimates, strict=True)
            )
        ]  # fmt: skip
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(written[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(written)
    median, lowest = statistics.median(map(abs, errors)), min(ranks)
    print(verdict(median <= MEDIAN_TARGET), end="")
    print(
        f"median |error| {median:.1%} over {len(errors)} rows, bar {MEDIAN_TARGET:.0%}; 90th "
        f"percentile {np.quantile(np.abs(errors), 0.9):.1%}"
    )
    print(verdict(statistics.median(ranks) >= SPEARMAN_TARGET), end="")
    print(
        f"Spearman {statistics.median(ranks):.3f} median, {lowest:.3f} lowest, of {len(ranks)} "
        f"groups, bar {SPEARMAN_TARGET}"
    )
    return int(median > MEDIAN_TARGET or statistics.median(ranks) < SPEARMAN_TARGET)


def verdict(good: bool) -> str:
    """Return how a line begins."""
    return "pass: " if good else "short: "


def size_of(row: Row) -> int:
    """Return what models are ordered by."""
    return int(row["layers"]) * int(row["hidden"]) ** 2


def predict(row: Row) -> TimeEstimate:
    """Predict a row from what its source states."""
    gpus, seq_len = int(row["gpus"]), int(row["seq_len"])
    batch, steps = int(row["micro_batch"]), int(row["grad_accum"])
    plan = Plan(
        strategy="fsdp2",
        engine=Engine.FSDP2,
        dp_shard=gpus,
        micro_batch_size=batch,
        grad_accum_steps=steps,
        recompute=Recompute.FULL if row["activation_checkpointing"] == "full" else Recompute.NONE,
    )
    workload = Workload(seq_len=seq_len, global_batch_size=gpus * batch * steps, packing=False)
    return estimate_time(model_of(row), workload, plan, hardware_of(row["gpu_mem_gb"], gpus))


def hardware_of(memory: str, gpus: int) -> HardwareSpec:
    """A100 nodes of 8, 1600 Gbit/s between them: 25 GB/s a GPU."""
    return load_hardware(_GPUS[memory], gpus)


def model_of(row: Row) -> ModelSpec:
    """Return a decoder of MPT's sizes: two MLP matrices of ``4 h`` as three of ``8 h / 3``."""
    hidden = int(row["hidden"])
    return model_from_config(
        row["model"],
        {
            "model_type": "llama", "architectures": ["LlamaForCausalLM"],
            "vocab_size": int(row["vocab"]), "hidden_size": hidden,
            "intermediate_size": round(8 * hidden / 3), "num_hidden_layers": int(row["layers"]),
            "num_attention_heads": int(row["heads"]), "num_key_value_heads": int(row["heads"]),
            "max_position_embeddings": 65536, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
        },
    )  # fmt: skip


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Return the rank correlation; equal values share their mean rank."""
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    below = (values[None, :] < values[:, None]).sum(1)
    equal = (values[None, :] == values[:, None]).sum(1)
    return below + (equal - 1) / 2


if __name__ == "__main__":
    sys.exit(main())
