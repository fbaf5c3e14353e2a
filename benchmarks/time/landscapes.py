"""Predicted against measured step times on recorded landscapes of real trials.

    python benchmarks/time/landscapes.py [FOLDER ...] [--out benchmarks/time/landscapes.csv]

For each NAME.csv with its NAME.json beside it (benchmarks/search/landscapes): the error of the
formulas alone, of the formulas with NAME.calibration.json, a sweep of the machine that measured it,
and of that after the residual learned from every other family of the landscape (leave one family
out: a family is what one launch measures). A calibration is written by

    autotune doctor --measure --gpus 2 --device cpu --model tiny-qwen3 --seq-len 256 \\
        --out benchmarks/search/landscapes/NAME.calibration.json

Exits 1 where a landscape with a calibration is short of its figures.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from published import spearman, verdict

from autotune.calibrate.residual import TimeResidual
from autotune.calibrate.store import read_calibration
from autotune.plan import Plan
from autotune.spec.hardware import HardwareSpec, Link, load_hardware
from autotune.spec.model import load_model
from autotune.spec.workload import Workload
from autotune.timing import Calibration, estimate_time_table

HERE = Path(__file__).parent
FOLDER = HERE.parent / "search" / "landscapes"
RESULTS = HERE / "landscapes.csv"
PLOT = HERE.parents[1] / "docs" / "images" / "time_landscapes.png"
MEDIAN_TARGET, SPEARMAN_TARGET = 0.10, 0.9
FORMULAS, CALIBRATED, REFITTED = "formulas", "calibrated", "refitted"


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A landscape's plans that ran, and what it was measured on."""

    name: str
    plans: tuple[Plan, ...]
    step_s: np.ndarray
    """Mean over the launches of the median step."""
    families: tuple[str, ...]
    story: dict[str, Any]
    calibration: Calibration | None


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, default=[FOLDER], metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--plot", type=Path, default=PLOT)
    args = parser.parse_args()
    found = [each for folder in args.folders for each in read_landscapes(folder)]
    if not found:
        print(f"no landscape in {', '.join(map(str, args.folders))}", file=sys.stderr)
        return 2
    short, written, drawn = 0, [], {}
    for landscape in found:
        predictions = predict(landscape)
        drawn[landscape.name] = (landscape, predictions)
        for how, predicted in predictions.items():
            median, rank = figures(landscape, predicted)
            judged = how == (CALIBRATED if landscape.calibration else "")
            good = median <= MEDIAN_TARGET and rank >= SPEARMAN_TARGET
            short += judged and not good
            print(
                f"{verdict(good) if judged else ''}{landscape.name}, {how}: median |error| "
                f"{median:.1%}, Spearman {rank:.3f}, {len(landscape.plans)} plans"
            )
            written.append([landscape.name, how, len(landscape.plans), f"{median:.4f}",
                            f"{rank:.4f}", f"{bias(landscape, predicted):.4f}"])  # fmt: skip
    with args.out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["landscape", "model", "plans", "median_abs_error", "spearman", "bias"])
        writer.writerows(written)
    plot(drawn, args.plot)
    return int(short > 0)


def read_landscapes(folder: Path) -> list[Measured]:
    """Read every landscape of a folder."""
    return [
        read_landscape(path)
        for path in sorted(folder.glob("*.csv"))
        if path.with_suffix(".json").is_file()
    ]


def read_landscape(path: Path) -> Measured:
    """Read NAME.csv, NAME.json and, if there is one, NAME.calibration.json."""
    times: dict[str, list[float]] = defaultdict(list)
    plans: dict[str, Plan] = {}
    families: dict[str, str] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            steps = json.loads(row["step_times_s"] or "[]")
            # Round 0 holds cold launches, which are there for their starts.
            if row["outcome"] != "ok" or not steps or int(row["round"]) < 1:
                continue
            plan = Plan.from_dict(json.loads(row["plan"]))
            plans[plan.id] = plan
            families[plan.id] = row["family"]
            times[plan.id].append(statistics.median(steps))
    return Measured(
        name=path.stem,
        plans=tuple(plans.values()),
        step_s=np.array([statistics.mean(times[each]) for each in plans]),
        families=tuple(families[each] for each in plans),
        story=json.loads(path.with_suffix(".json").read_text()),
        calibration=read_calibration(path.with_suffix(".calibration.json")),
    )


def hardware_of(story: dict[str, Any]) -> HardwareSpec:
    """Return the hardware a landscape was measured on, as the planner saw it."""
    said = story["hardware"]
    ranks, per_node = int(said["ranks"]), int(said["gpus_per_node"])
    on_cpu = said["device"] == "cpu"
    # A CPU's nodes are namespaces of one machine, each with its own part of the cores.
    hardware = load_hardware("cpu" if on_cpu else said["gpu"], ranks, one_node=not on_cpu)
    rate = said.get("inter_node_bytes_per_s") or hardware.inter_node.bytes_per_s
    link = Link(alpha_s=hardware.inter_node.alpha_s, bytes_per_s=float(rate))
    return replace(
        hardware, gpus_per_node=per_node, num_nodes=int(said["num_nodes"]), inter_node=link
    )


def predict(landscape: Measured) -> dict[str, np.ndarray]:
    """Return the predicted seconds a step, by how they were predicted."""
    story = landscape.story
    model = load_model(story["model"]["name"])
    workload = Workload.model_validate(story["workload"])
    hardware = hardware_of(story)

    def table(calibration: Calibration | None) -> np.ndarray:
        return estimate_time_table(model, workload, landscape.plans, hardware, calibration).step_s

    found = {FORMULAS: table(None)}
    best = found[FORMULAS]
    if landscape.calibration is not None:
        best = found[CALIBRATED] = table(landscape.calibration)
    return found | {REFITTED: leave_one_family_out(landscape, best)}


def leave_one_family_out(landscape: Measured, predicted: np.ndarray) -> np.ndarray:
    """Correct each family by what all others measured."""
    corrected = predicted.copy()
    families = np.array(landscape.families)
    for family in sorted(set(landscape.families)):
        own = np.flatnonzero(families == family)
        residual = TimeResidual()
        for other in np.flatnonzero(families != family):
            residual.learn(
                landscape.plans[other], float(predicted[other]), float(landscape.step_s[other])
            )
        corrected[own] = residual.corrected_s([landscape.plans[n] for n in own], predicted[own])
    return corrected


def figures(landscape: Measured, predicted: np.ndarray) -> tuple[float, float]:
    """Return the median of |predicted / measured - 1| and the rank correlation."""
    error = np.abs(predicted / landscape.step_s - 1)
    return float(np.median(error)), spearman(predicted, landscape.step_s)


def bias(landscape: Measured, predicted: np.ndarray) -> float:
    """Return the median of predicted / measured - 1."""
    return float(np.median(predicted / landscape.step_s - 1))


def plot(drawn: dict[str, tuple[Measured, dict[str, np.ndarray]]], path: Path) -> None:
    """Draw predicted over measured, a panel a landscape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, len(drawn), figsize=(4.5 * len(drawn), 4.2), squeeze=False, layout="constrained"
    )
    for axis, (name, (landscape, predictions)) in zip(axes[0], drawn.items(), strict=True):
        _panel(axis, landscape.step_s, predictions)
        axis.set_title(name)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(axis: Any, measured: np.ndarray, predictions: dict[str, np.ndarray]) -> None:
    values: Sequence[np.ndarray] = [measured, *predictions.values()]
    low, high = min(v.min() for v in values) / 1.2, max(v.max() for v in values) * 1.2
    axis.plot([low, high], [low, high], color="0.6", linewidth=1)
    for marker, (how, predicted) in zip("x+o", predictions.items(), strict=False):
        axis.plot(measured, predicted, marker, label=how, markersize=5, fillstyle="none")
    axis.set(
        xscale="log", yscale="log", xlim=(low, high), ylim=(low, high),
        xlabel="measured, s a step", ylabel="predicted, s a step",
    )  # fmt: skip
    axis.legend(loc="upper left")


if __name__ == "__main__":
    sys.exit(main())
