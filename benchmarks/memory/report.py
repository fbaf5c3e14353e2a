"""Recompute every prediction of the committed measurements, and say how good they are.

    python benchmarks/memory/report.py [--measure]     # make bench-memory

Writes `published_predicted.csv`, `peers.csv`, `peers_left_out.csv`, `ranks.csv`,
`figures.csv` and the plots of docs/memory.md, and prints the table of figures. With ``--measure``
what can be measured here is measured again first: runs on CPU ranks.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import figures
import page
import plots
import predict_published
import published
import ranks_cases
import ranks_errors
import ranks_measured
import residuals
from peers import PEERS, CannotTake
from points import Point

from autotune.errors import AutotuneError
from autotune.memory.table import CUDA_CONTEXT_BYTES, NCCL_BYTES

HERE = Path(__file__).parent
IMAGES = HERE.parents[1] / "docs" / "images"
EXAMPLES = HERE.parents[1] / "reports" / "examples"
PUBLISHED_COLUMNS = (
    "id", "set", "use", "model", "engine", "method", "metric", "measured_bytes", "predicted_bytes",
    "error", "instant", "capacity_bytes", "called_oom",
)  # fmt: skip


def main() -> int:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="measure CPU ranks again first")
    if parser.parse_args().measure:
        (HERE / "ranks_measured.csv").unlink(missing_ok=True)
        subprocess.run([sys.executable, str(HERE / "ranks.py"), "--measure"], check=True)
    published_rows = predict_all_published()
    write(HERE / "published_predicted.csv", PUBLISHED_COLUMNS, published_rows)
    rank_rows = predict_ranks()
    ranks_errors.write(rank_rows, HERE / "ranks.csv")
    peer_rows, left_out = compare_peers(published_rows, rank_rows)
    names = [peer.name for peer in PEERS]
    write(HERE / "peers.csv", ("id", "source", "metric", "measured_bytes", "autotune", *names),
          peer_rows)  # fmt: skip
    write(HERE / "peers_left_out.csv", ("peer", "version", "points", "reason"), left_out)
    found = [
        *figures.ranks(rank_rows),
        figures.coverage(*coverage()),
        *figures.published(published_rows),
        *figures.gpu(sorted(EXAMPLES.glob("*/memory/memory.csv"))),
        *figures.peers(peer_rows, {peer.name: peer.activations for peer in PEERS}),
        *figures.speed(HERE.parent / "results" / "memory_speed.csv"),
    ]
    write(
        HERE / "figures.csv",
        ("figure", "value", "target", "verdict", "of"),
        [{"figure": f.name, "value": f.text, "target": f.target, "verdict": f.verdict, "of": f.of}
         for f in found],
    )  # fmt: skip
    medians = peer_medians(peer_rows)
    draw(published_rows, rank_rows, medians)
    alone = peer_medians([row for row in peer_rows if row["source"] != "ranks"])
    medians |= {f"{name}, published points alone": line for name, line in alone.items()}
    write_page(found, published_rows, rank_rows, medians)
    print(figures.table(found))
    for line in by_set(published_rows):
        print(", ".join(f"{a} {b}" for a, b in zip(_SET_HEADER, line, strict=True)))
    print("\n".join(apart(published_rows)))
    return 0


def predict_all_published() -> list[dict[str, Any]]:
    """Predict every published row that is predicted at all."""
    rows = [row for row in published.read_rows() if predict_published.predictable(row)]
    predict_published.trace_all(rows)
    found = []
    for row in rows:
        try:
            predicted, instant, _ = predict_published.predict(row)
        except AutotuneError as error:
            print(f"{row['id']}: not predicted: {error}", file=sys.stderr)
            continue
        measured = published.measured_bytes(row)
        capacity = published.gpu_memory_bytes(row)
        framework = CUDA_CONTEXT_BYTES + NCCL_BYTES * (int(row["gpus"]) > 1)
        over = capacity is not None and predicted + framework > capacity
        found.append(
            {
                name: row[name]
                for name in ("id", "set", "use", "model", "engine", "method", "metric")
            }
            | {
                "measured_bytes": "" if measured is None else round(measured),
                "predicted_bytes": round(predicted),
                "error": "" if measured is None else round(predicted / measured - 1, 4),
                "instant": instant,
                "capacity_bytes": capacity or "",
                "called_oom": "" if capacity is None else "yes" if over else "no",
            }
        )
    return found


def predict_ranks() -> list[dict[str, Any]]:
    """Predict what was measured on CPU ranks."""
    measured = ranks_measured.read_rows(HERE / "ranks_measured.csv")
    cases = [case for case in ranks_cases.cases() if case.name in measured]
    ranks_errors.trace_all(cases)
    return [ranks_errors.row_of(case, measured[case.name]) for case in cases]


def coverage() -> tuple[int, int]:
    """Return how many runs on CPU ranks lie in their 90% interval, and how many there are."""
    rows = residuals.ranks_rows()
    inside = [found for _, found in residuals.held_out(rows)] if rows else []
    return sum(inside), len(inside)


def rank_points(rows: Sequence[Mapping[str, Any]]) -> Iterable[tuple[Point, float]]:
    """Yield the runs on CPU ranks as points, with our prediction."""
    by_name = {row["name"]: row for row in rows}
    for case in ranks_cases.cases():
        row = by_name.get(case.name)
        if row is None:
            continue
        plan, workload = case.plan, case.workload
        yield (
            Point(
                id=case.name,
                source="ranks",
                config=ranks_cases.MODELS[case.architecture],
                measured_bytes=row["measured"],
                metric="allocated",
                engine=f"zero{plan.zero_stage}" if plan.zero_stage else plan.engine.value,
                world_size=plan.world_size,
                shards=plan.shard_size,
                precision="fp32" if workload.precision.value == "fp32" else "mixed",
                micro_batch_size=plan.micro_batch_size,
                seq_len=workload.seq_len,
                grad_accum_steps=plan.grad_accum_steps,
                checkpointing=plan.recompute.value != "none",
                lora=workload.adapter,
                # What is offloaded stays in the memory of a CPU rank, and is measured.
                offload=False,
            ),
            float(row["predicted"]),
        )


def compare_peers(
    published_rows: Sequence[Mapping[str, Any]], rank_rows: Sequence[Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Ask every peer about every measured point; return their answers, and why some are missing."""
    ours = {r["id"]: float(r["predicted_bytes"]) for r in published_rows if r["use"] == "scored"}
    rows = [row for row in published.read_rows() if row["id"] in ours]
    points = [(point, ours[point.id]) for point in published.points(rows)]
    points += rank_points(rank_rows)
    found, reasons = [], Counter[tuple[str, str, str]]()
    for point, own in points:
        assert point.measured_bytes is not None
        answers: dict[str, Any] = {}
        for peer in PEERS:
            try:
                answers[peer.name] = round(peer.ask(point))
            except CannotTake as reason:
                answers[peer.name] = ""
                reasons[peer.name, peer.version, str(reason)] += 1
        found.append(
            {"id": point.id, "source": point.source, "metric": point.metric,
             "measured_bytes": round(point.measured_bytes), "autotune": round(own)} | answers
        )  # fmt: skip
    known = {name for name, _, _ in reasons}
    left_out = [
        {"peer": name, "version": version, "points": count, "reason": reason}
        for (name, version, reason), count in sorted(reasons.items())
    ]
    left_out += [
        {"peer": p.name, "version": p.version, "points": 0, "reason": "takes every point"}
        for p in PEERS
        if p.name not in known
    ]
    return found, left_out


def peer_medians(
    rows: Sequence[Mapping[str, Any]],
) -> dict[str, tuple[float, float, int]]:
    """Return each peer's median error, ours on the same points, and how many those are."""
    medians = {}
    for peer in PEERS:
        common = [row for row in rows if row[peer.name] != ""]
        if common:
            theirs, own = (
                figures.median(float(r[c]) / float(r["measured_bytes"]) - 1 for r in common)
                for c in (peer.name, "autotune")
            )
            medians[f"{peer.name} {peer.version}".strip()] = (theirs, own, len(common))
    return medians


def draw(
    published_rows: Sequence[Mapping[str, Any]],
    rank_rows: Sequence[Mapping[str, Any]],
    medians: Mapping[str, tuple[float, float, int]],
) -> None:
    """Make the plots of docs/memory.md."""
    scored = [row for row in published_rows if row["use"] == "scored"]
    plots.scatter(scored, "set", "Published runs, fully stated", IMAGES / "memory_published.png")
    plots.errors(scored, "model", "Published runs, fully stated", IMAGES / "memory_by_model.png")
    if rank_rows:
        as_points = [
            {"measured_bytes": r["measured"], "predicted_bytes": r["predicted"]} | dict(r)
            for r in rank_rows
        ]
        plots.errors(as_points, "engine", "Runs on CPU ranks", IMAGES / "memory_ranks.png")
    plots.medians(medians, "On the points both predict", IMAGES / "memory_peers.png")


def by_set(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Return a line a set and kind of row: its errors, or how it was classified."""
    lines = []
    for use, words in (("scored", "fully stated"), ("incomplete", "incomplete")):
        for name in published.SETS:
            errors = [float(r["error"]) for r in rows if r["set"] == name and r["use"] == use]
            if errors:
                lines.append(
                    (f"{name}, {words}", str(len(errors)), _percent(figures.median(errors)),
                     _percent(figures.percentile_95(errors)), _percent(figures.worst_under(errors)))
                )  # fmt: skip
    return lines


def by_instant(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return a line a split: all peaks, those that are not the loss's; and a line an instant."""
    errors = {}
    for split, words in (("tune", "tuned on"), ("held_out", "held out")):
        own = [row for row in rows if row["split"] == split]
        errors[f"peak, {words}"] = [row["error"] for row in own]
        elsewhere = [r["error"] for r in own if not r["measured_instant"].endswith("loss")]
        errors[f"peak elsewhere than in the loss, {words}"] = elsewhere
    for name in ranks_errors.COMPARED:
        errors[name.replace("_", " ")] = ranks_errors.instant_errors(rows, name)
    found = [(name, ranks_errors.figures(values)) for name, values in errors.items() if values]
    return [
        (name, str(f["count"]), *map(_percent, (f["median"], f["p95"], f["worst_under"],
                                                f["worst_over"])))
        for name, f in found
    ]  # fmt: skip


def apart(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what is held to no figure: failures only inferred, and the rows left out."""
    lines = []
    recall, precision, of = figures.classification(rows, "oom_inferred")
    if recall is not None and precision is not None:
        lines.append(
            f"Rows only inferred to be out of memory: recall {_percent(recall)}, precision "
            f"{_percent(precision)} ({of})."
        )
    skipped = Counter(
        (row["set"], row["reason"]) for row in published.read_rows() if row["use"] == "left_out"
    )
    lines += [f"Left out of {name}, {n} rows: {why}." for (name, why), n in sorted(skipped.items())]
    return lines


_SET_HEADER = ("rows", "count", "median error", "95th percentile", "worst under-prediction")
_INSTANTS_HEADER = (
    "bytes at", "count", "median error", "95th percentile", "worst under-prediction",
    "worst over-prediction",
)  # fmt: skip


def write_page(
    found: Sequence[figures.Figure],
    published_rows: Sequence[Mapping[str, Any]],
    rank_rows: Sequence[dict[str, Any]],
    medians: Mapping[str, tuple[float, float, int]],
) -> None:
    """Write the tables of docs/memory.md."""
    lines = [(f.name, f.text, f.target, f.verdict, f.of) for f in found]
    peers_lines = [
        (name, str(count), _percent(theirs), _percent(own), f"{theirs / own:.1f}")
        for name, (theirs, own, count) in medians.items()
    ]
    page.write(
        {
            "figures": page.markdown(("figure", "value", "target", "", "of"), lines),
            "sets": page.markdown(_SET_HEADER, by_set(published_rows))
            + "\n\n"
            + "\n".join(f"- {line}" for line in apart(published_rows)),
            "instants": page.markdown(_INSTANTS_HEADER, by_instant(rank_rows)),
            "peers": page.markdown(
                ("peer", "common points", "its median error", "ours", "times closer"), peers_lines
            ),
        }
    )


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def write(file: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as CSV."""
    with file.open("w", newline="", encoding="utf-8") as text:
        writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
