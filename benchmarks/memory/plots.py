"""Error plots: predicted against measured, and the errors by source."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
_DPI = 110
# Okabe and Ito's palette, which colour-blind readers tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def scatter(rows: Sequence[Row], groups: str, title: str, file: Path) -> None:
    """Plot predicted over measured bytes, GiB on both axes, one colour a group."""
    figure, axes = _figure()
    by_group = _grouped(rows, groups)
    sizes = [_gib(row, c) for row in rows for c in ("measured_bytes", "predicted_bytes")]
    low, high = 0.8 * min(sizes), 1.25 * max(sizes)
    axes.plot([low, high], [low, high], color="0.4", linewidth=1)
    axes.fill_between(
        [low, high], [0.92 * low, 0.92 * high], [1.08 * low, 1.08 * high], color="0.9", label="8%"
    )
    for colour, (name, own) in zip(_COLOURS * 3, by_group.items(), strict=False):
        axes.scatter(
            [_gib(row, "measured_bytes") for row in own],
            [_gib(row, "predicted_bytes") for row in own],
            s=14, color=colour, label=f"{name} ({len(own)})", alpha=0.75, linewidths=0,
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), title=title,
             xlabel="measured, GiB", ylabel="predicted, GiB")  # fmt: skip
    ticks = [2**i for i in range(-6, 9) if low < 2**i < high]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_ticks([], minor=True)
    axes.legend(fontsize=8)
    _save(figure, file)


def errors(rows: Sequence[Row], groups: str, title: str, file: Path) -> None:
    """Plot each row's error, a line of points a group."""
    figure, axes = _figure()
    by_group = _grouped(rows, groups)
    for place, own in enumerate(by_group.values()):
        values = sorted(100 * float(row["error"]) for row in own)
        spread = [place + 0.6 * (i / max(1, len(values) - 1) - 0.5) for i in range(len(values))]
        axes.scatter(values, spread, s=12, color=_COLOURS[place % len(_COLOURS)], linewidths=0)
    axes.axvline(0, color="0.4", linewidth=1)
    axes.axvspan(-8, 8, color="0.93", zorder=0)
    axes.set_yticks(range(len(by_group)), [f"{n} ({len(o)})" for n, o in by_group.items()])
    axes.set(xlabel="predicted less measured, % of measured", title=title)
    axes.invert_yaxis()
    _save(figure, file)


def medians(values: Mapping[str, tuple[float, float, int]], title: str, file: Path) -> None:
    """Plot our median error beside each peer's, on the points both predict.

    Args:
        values: a peer's name: its median, ours, and the number of points.
        title: above the plot.
        file: the PNG.
    """
    figure, axes = _figure()
    for place, (theirs, ours, _) in enumerate(values.values()):
        for shift, median, colour in ((-0.19, theirs, _COLOURS[1]), (0.19, ours, _COLOURS[0])):
            bar = axes.barh(place + shift, 100 * median, 0.36, color=colour)
            axes.bar_label(bar, fmt="%.2g", fontsize=7, padding=2)
    axes.set_yticks(range(len(values)), [f"{n} ({v[2]} points)" for n, v in values.items()])
    axes.set(xlabel="median |error|, %", title=title)
    axes.legend(["the peer", "autotune"], fontsize=8)
    axes.invert_yaxis()
    _save(figure, file)


def _figure() -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(7, 5))


def _save(figure: Any, file: Path) -> None:
    from matplotlib import pyplot

    file.parent.mkdir(parents=True, exist_ok=True)
    # Without its version in the file, the same points make the same bytes.
    figure.savefig(file, dpi=_DPI, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)


def _grouped(rows: Sequence[Row], column: str) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[str(row[column])].append(row)
    return dict(found)


def _gib(row: Row, column: str) -> float:
    return float(row[column]) / 2**30
