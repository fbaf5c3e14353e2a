"""The regret plots of docs/search.md."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from replay import Replayed

_DPI = 110
_COLOURS = {
    "cost-model": "#0072B2", "tpe": "#D55E00", "tpe+planner": "#E69F00", "gp": "#CC79A7",
    "random": "0.35", "grid": "0.65", "deepspeed-autotuning": "#009E73",
    "cost-model+formulas": "#56B4E9", "tpe+rungs": "#F0E442",
}  # fmt: skip
"""Okabe and Ito's palette, which colour-blind readers tell apart."""


def regret(
    name: str, whole_s: float, samplers: Mapping[str, Sequence[Replayed]], file: Path
) -> None:
    """Plot the mean regret over seeds against spent time; the band holds the middle half."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    times = [whole_s * 10 ** (-2 + 2 * n / 199) for n in range(200)]
    shares = [100 * at / whole_s for at in times]
    for sampler, runs in samplers.items():
        at_times = [sorted(100 * run.regret_at(at) for run in runs) for at in times]
        colour = _COLOURS.get(sampler, "black")
        axes.plot(
            shares, [statistics.mean(regrets) for regrets in at_times], color=colour,
            label=sampler, linewidth=2.2 if sampler == "cost-model" else 1.2,
        )  # fmt: skip
        if sampler in ("cost-model", "tpe") and len(runs) >= 4:
            quarter = len(runs) // 4
            axes.fill_between(
                shares, [r[quarter] for r in at_times], [r[-1 - quarter] for r in at_times],
                color=colour, alpha=0.15, linewidth=0,
            )  # fmt: skip
    axes.axvline(10, color="0.6", linewidth=0.8, linestyle=":")
    axes.axhline(2, color="0.6", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=2)
    axes.spines["bottom"].set_visible(False)  # a regret of zero runs there
    axes.set(
        xlim=(1, 100), ylim=(0, 100), title=f"{name}: regret of the answer so far",
        xlabel="time spent, % of measuring every configuration",
        ylabel="slower than the best, %",
    )  # fmt: skip
    axes.set_xticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
    axes.set_yticks([0, 1, 2, 5, 10, 20, 50, 100], ["0", "1", "2", "5", "10", "20", "50", "100"])
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    file.parent.mkdir(parents=True, exist_ok=True)
    # Without its version in the file, the same points make the same bytes.
    figure.savefig(file, dpi=_DPI, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)
