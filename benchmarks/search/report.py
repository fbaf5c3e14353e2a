"""Replay every sampler on every recorded landscape, and say which figures are reached.

    python benchmarks/search/report.py [--seeds 10] [--landscapes A,B]     # make bench-search

Writes results/searches.csv (a row a search), results/regret.csv (regret against spent time),
results/figures.csv and the plots of docs/search.md, and prints the figures with pass or short.
Nothing is measured: launches, warm-ups and steps are those of the recordings, and so are their
costs. Every sampler has the same preloaded starts and the same ladders.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import search_plots
from landscape import FOLDER, Landscape, landscape_names, load_landscape
from recorded import recorded
from replay import SAMPLERS, Replayed, exhaustive_s, one_launch_each_s, replay
from search_page import write_page

HERE = Path(__file__).parent
RESULTS = HERE / "results"
IMAGES = HERE.parents[1] / "docs" / "images"
OURS = "cost-model"
SEEDS = 10
"""Fewer, or a part of the landscapes, leave docs/search.md as it is."""
SHARE = 0.1
"""Of the exhaustive cost, within which the issue of a good answer is judged."""
MEDIAN_AT_MOST, P95_AT_MOST = 0.02, 0.05
OF_TPE = 0.5
FORK_OF_COLD = 0.25
_BETTER = "area over the best other"
"""A figure that must lie below its bar, not at it."""
_PASSED = {True: "pass", False: "short", None: ""}
_GRID = 60
"""Points of time of the regret curves, evenly in log time from 1% of the exhaustive cost on."""

Figure = dict[str, Any]


def main() -> int:
    args = parse_arguments()
    names = args.landscapes or landscape_names(args.folder)
    if not names:
        print(f"No landscape in {args.folder}: record one with benchmarks/search/record.py.")
        return 0
    started = time.monotonic()
    landscapes = {name: load_landscape(name, args.folder) for name in names}
    jobs = [
        (str(args.folder), name, sampler, seed)
        for name in names
        for sampler in args.samplers
        for seed in range(args.seeds)
    ]
    with ProcessPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        searches = list(pool.map(_search, jobs, chunksize=4))
    figures: list[Figure] = []
    for name, landscape in landscapes.items():
        own = [search for search in searches if search.landscape == name]
        figures += figures_of(landscape, own)
    write_results(args.results, landscapes, searches, figures)
    for name, landscape in landscapes.items():
        own = [search for search in searches if search.landscape == name]
        search_plots.regret(
            name, exhaustive_s(landscape), by_sampler(own), args.images / f"regret-{name}.png"
        )
    whole = not args.landscapes and set(args.samplers) == set(SAMPLERS) and args.seeds >= SEEDS
    if args.folder == FOLDER and whole:
        write_page(figures, list(landscapes), SAMPLERS)
    print_figures(figures, args.seeds, time.monotonic() - started)
    print_recorded()
    return 0


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=SEEDS, help="default: %(default)s")
    parser.add_argument("--landscapes", type=lambda text: text.split(","), help="default: all")
    parser.add_argument(
        "--samplers", type=lambda text: text.split(","), default=SAMPLERS, help="default: all"
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help="default: landscapes/")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: results/")
    parser.add_argument("--images", type=Path, default=IMAGES, help="default: docs/images/")
    return parser.parse_args(argv)


_LOADED: dict[tuple[str, str], Landscape] = {}


def _search(job: tuple[str, str, str, int]) -> Replayed:
    folder, name, sampler, seed = job
    warnings.simplefilter("ignore")  # Optuna's notes on experimental options, once a search
    if (folder, name) not in _LOADED:
        _LOADED[folder, name] = load_landscape(name, Path(folder))
    landscape = _LOADED[folder, name]
    return replay(landscape, sampler, seed=seed, until_s=exhaustive_s(landscape))


def by_sampler(searches: Iterable[Replayed]) -> dict[str, list[Replayed]]:
    found: dict[str, list[Replayed]] = {}
    for search in searches:
        found.setdefault(search.sampler, []).append(search)
    return found


def figures_of(landscape: Landscape, searches: Sequence[Replayed]) -> list[Figure]:
    """Return the figures of a landscape, each with its bar where the issue sets one."""
    own = by_sampler(searches)
    whole_s = exhaustive_s(landscape)
    figures: list[Figure] = []

    def add(figure: str, value: float, bar: float | None = None, detail: str = "") -> None:
        better = bar is not None and (value < bar if figure.startswith(_BETTER) else value <= bar)
        passed = None if bar is None else better
        figures.append(
            {
                "landscape": landscape.name, "figure": figure, "value": value, "at_most": bar,
                "passed": passed, "detail": detail,
            }
        )  # fmt: skip

    areas = {name: statistics.mean(s.area(whole_s) for s in runs) for name, runs in own.items()}
    for name, runs in own.items():
        regrets = [search.regret_at(SHARE * whole_s) for search in runs]
        bars = (MEDIAN_AT_MOST, P95_AT_MOST) if name == OURS else (None, None)
        add(f"median regret after 10%, {name}", statistics.median(regrets), bars[0])
        add(f"95th percentile after 10%, {name}", percentile(regrets, 0.95), bars[1])
        gaps = [search.gap_at(SHARE * whole_s) for search in runs]
        add(f"median gap after 10%, noise not left out, {name}", statistics.median(gaps))
        add(f"area under regret, {name}", areas[name])
    others = {name: area for name, area in areas.items() if not name.startswith(OURS)}
    if OURS in areas and others:
        best = min(others, key=lambda name: others[name])
        add("area over the best other sampler's", _ratio(areas[OURS], others[best]), 1.0, best)
        if "tpe" in others:
            tpe = min(("tpe", "tpe+rungs"), key=lambda name: others.get(name, math.inf))
            add("area over TPE's", _ratio(areas[OURS], others[tpe]), OF_TPE, tpe)
    if OURS in own:
        runs = own[OURS]
        spent = statistics.mean(min(search.spent_s, whole_s) for search in runs)
        add("share of the exhaustive cost until it stops", spent / whole_s)
        ends = [search.regret_at(math.inf) for search in runs]
        add("median regret where it stops", statistics.median(ends))
        if landscape.sweep_s is not None:
            add("sweep of the machine, once, over the exhaustive cost", landscape.sweep_s / whole_s)
        add("most launches of one arm", max(search.most_launches_an_arm for search in runs), 1)
    forked_s = one_launch_each_s(landscape, cold=False)
    add("launcher: ladder, cost over one launch each", whole_s / forked_s)
    if landscape.cold_ready_s:
        cold_s = one_launch_each_s(landscape, cold=True)
        add("launcher: fork and ladder, cost over cold one launch each", whole_s / cold_s)
        for engine, (fork, cold) in starts(landscape).items():
            add(f"fork start over cold start, {engine}", fork / cold, FORK_OF_COLD)
    return figures


def starts(landscape: Landscape) -> dict[str, tuple[float, float]]:
    """Return an engine's mean recorded start: forked, and cold."""
    found: dict[str, list[float]] = {}
    for rows in landscape.rows.values():
        for row in rows:
            if row.launch_mode == "fork":
                offload = "-offload" if row.plan.offload_optimizer else ""
                found.setdefault(f"{row.plan.engine}{offload}", []).append(row.launch_ready_s)
    return {
        engine: (statistics.mean(forked), landscape.cold_ready_s[engine])
        for engine, forked in found.items()
        if engine in landscape.cold_ready_s
    }


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least this share of the values does not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def _ratio(one: float, other: float) -> float:
    return one / other if other else math.inf


def write_results(
    folder: Path,
    landscapes: Mapping[str, Landscape],
    searches: Sequence[Replayed],
    figures: Sequence[Figure],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    whole = {name: exhaustive_s(landscape) for name, landscape in landscapes.items()}
    _write(
        folder / "searches.csv",
        [
            {
                "landscape": s.landscape, "sampler": s.sampler, "seed": s.seed,
                "spent_s": round(s.spent_s, 2),
                "exhaustive_s": round(whole[s.landscape], 2),
                "launches": s.launches, "records": s.records,
                "regret_after_10_percent": round(s.regret_at(SHARE * whole[s.landscape]), 5),
                "final_regret": round(s.regret_at(math.inf), 5),
                "area": round(s.area(whole[s.landscape]), 5), "because": s.because,
            }
            for s in searches
        ],
    )  # fmt: skip
    rows = []
    for name, total_s in whole.items():
        for sampler, runs in by_sampler(s for s in searches if s.landscape == name).items():
            for at_s in times(total_s):
                regrets = [run.regret_at(at_s) for run in runs]
                rows.append(
                    {
                        "landscape": name, "sampler": sampler, "spent_s": round(at_s, 2),
                        "share_of_exhaustive": round(at_s / total_s, 5),
                        "median_regret": round(statistics.median(regrets), 5),
                        "p95_regret": round(percentile(regrets, 0.95), 5),
                        "mean_regret": round(statistics.mean(regrets), 5),
                    }
                )  # fmt: skip
    _write(folder / "regret.csv", rows)
    _write(folder / "figures.csv", figures)


def times(total_s: float) -> list[float]:
    return [total_s * 10 ** (-2 + 2 * n / (_GRID - 1)) for n in range(_GRID)]


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def print_figures(figures: Sequence[Figure], seeds: int, elapsed_s: float) -> None:
    print(f"{seeds} seeds a sampler and landscape, replayed in {elapsed_s:.0f} s\n")
    landscape = None
    for figure in figures:
        if figure["landscape"] != landscape:
            landscape = figure["landscape"]
            print(landscape)
        said = _PASSED[figure["passed"]]
        bar = "" if figure["at_most"] is None else f"at most {figure['at_most']:g}"
        detail = f" ({figure['detail']})" if figure["detail"] else ""
        print(f"  {figure['figure'] + detail:58} {figure['value']:8.3f}  {bar:14} {said}")


def print_recorded() -> None:
    print("\nmeasured by other benchmarks, as committed")
    for one in recorded():
        print(f"  {one.figure:58} {one.value:8.3f}  {one.bar:14} {_PASSED[one.passed]}")


if __name__ == "__main__":
    sys.exit(main())
