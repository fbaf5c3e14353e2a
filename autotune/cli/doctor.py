"""`autotune doctor`: what this machine has, what will go wrong on it, and how fast it is."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from autotune.cli.options import positive_int
from autotune.cli.tables import make_console
from autotune.units import parse_duration_s

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from autotune.doctor import Finding
    from autotune.timing.calibration import Calibration


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the verb takes."""
    parser.add_argument(
        "--measure",
        action="store_true",
        help="sweep matrix products, memory and links with real ranks, about a minute; the result "
        "is kept for later predictions on this machine",
    )
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], help="default: cuda where there is a GPU, else cpu"
    )
    parser.add_argument(
        "--gpus",
        type=positive_int,
        metavar="N",
        help="ranks that measure together (default: every GPU; on cpu 2)",
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="hold the host's memory against it; with --measure its layers are measured as well, "
        "and on CPU ranks its engines",
    )
    parser.add_argument(
        "--seq-len",
        type=positive_int,
        action="append",
        default=[],
        metavar="TOKENS",
        help="sequence length at which the model is measured; may be given several times",
    )
    parser.add_argument(
        "--precision", choices=["bf16", "fp32"], default="bf16", help="default: %(default)s"
    )
    parser.add_argument(
        "--packing",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure the model on packed sequences (default: on)",
    )
    parser.add_argument(
        "--nodes", type=positive_int, default=1, metavar="N", help="hosts of the runs to come"
    )
    parser.add_argument(
        "--timeout",
        metavar="TIME",
        default="30s",
        help="how long an all-reduce of a pair of ranks may take (default: %(default)s)",
    )
    parser.add_argument(
        "--no-collectives",
        action="store_true",
        help="start no ranks: leave the all-reduce of every pair and of all out",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write the calibration here, not into the cache"
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON document on stdout instead of text"
    )


def run(args: argparse.Namespace) -> int:
    """Print what there is and what is wrong; 1 when something is broken or was not measured."""
    from autotune.calibrate.store import calibration_file, read_calibration, save_calibration
    from autotune.doctor import Level
    from autotune.memory.fingerprint import machine_fingerprint

    _check(args)
    gpus = _gpus(args.device)
    device: Literal["cuda", "cpu"] = args.device or ("cuda" if gpus else "cpu")
    ranks = args.gpus or (_most_ranks(gpus) if device == "cuda" else 2)
    machine = machine_fingerprint(device).to_dict()
    findings = _findings(args, device, ranks)
    notes: list[str] = []
    path: Path | None
    calibration: Calibration | None
    if args.measure and any(f.check == "allreduce" and f.level is Level.BROKEN for f in findings):
        path, calibration = None, None
        notes = ["the machine: its ranks do not reach one another, so that a sweep would hang"]
    elif args.measure:
        calibration, notes = _measure(args, device, ranks)
        path = save_calibration(calibration, args.out)
    else:
        path = calibration_file(machine, ranks)
        calibration = read_calibration(path)
        path = path if calibration else None
    document = {
        "device": device,
        "gpus": list(gpus),
        "machine": machine,
        "calibration_file": str(path) if path else None,
        "calibration": _summary(calibration) if calibration else None,
        "not_measured": notes,
        "findings": [finding.to_dict() for finding in findings],
    }
    if args.json:
        sys.stdout.write(json.dumps(document, indent=1) + "\n")
    else:
        _print(document)
        print_findings(findings, make_console())
    return int(bool(notes) or any(finding.level is Level.BROKEN for finding in findings))


def _gpus(device: str | None) -> list[str]:
    """Return the names of the visible GPUs; none where there are none, or the CPU is asked for.

    Raises:
        AutotuneError: the variables name GPUs that are not there, or the driver fails.
    """
    from autotune.errors import AutotuneError
    from autotune.spec.nvml import NoGpuError, nvml_devices

    try:
        return nvml_devices()[0]
    except NoGpuError:
        return []
    except AutotuneError:
        if device == "cpu":
            return []
        raise


def _most_ranks(gpus: Sequence[str]) -> int:
    """Return how many ranks the GPUs take: CUDA shows a process one slice (MIG)."""
    from autotune.spec.nvml import is_slice_name

    return 1 if any(map(is_slice_name, gpus)) else len(gpus)


def _findings(
    args: argparse.Namespace, device: Literal["cuda", "cpu"], ranks: int
) -> list[Finding]:
    from autotune.doctor import Machine
    from autotune.doctor.all_checks import examine
    from autotune.spec.model import load_model

    timeout_s = parse_duration_s(args.timeout)
    model = load_model(args.model, any_family=True) if args.model else None
    return examine(
        Machine(),
        device=device,
        ranks=ranks,
        nodes=args.nodes,
        model=model.name if model else "",
        num_parameters=model.num_parameters if model else None,
        collectives_timeout_s=None if args.no_collectives else timeout_s,
    )


def print_findings(findings: Sequence[Finding], console: Console) -> None:
    """Print a line a finding and, under what is not well, what to do; then how many there are."""
    from rich.text import Text

    from autotune.doctor import Level

    styles = {Level.OK: "green", Level.NOTE: "dim", Level.WARNING: "yellow", Level.BROKEN: "red"}
    width = max(len(finding.check) for finding in findings)
    indent = " " * (len("warning") + width + 4)
    room = max(20, console.width - len(indent))
    console.print()
    for finding in findings:
        seen = textwrap.wrap(finding.seen, room, break_on_hyphens=False)
        console.print(
            Text(f"{finding.level:<7}", style=styles[finding.level]),
            Text(f" {finding.check:<{width}}  {seen[0]}"),
            soft_wrap=True,
        )
        do = textwrap.wrap(finding.do, room - 3, break_on_hyphens=False)
        arrows = [("-> " if n == 0 else "   ") + line for n, line in enumerate(do)]
        for line in [*seen[1:], *arrows]:
            console.print(Text(indent + line), soft_wrap=True)
    counts = Counter(finding.level for finding in findings)
    told = ", ".join(f"{counts[level]} {level}" for level in reversed(Level) if counts[level])
    console.print(Text(f"\n{told}."))


def _check(args: argparse.Namespace) -> None:
    from autotune.errors import AutotuneError

    if args.measure:
        return
    for name in ("seq_len", "out"):
        if getattr(args, name):
            flag = "--" + name.replace("_", "-")
            raise AutotuneError(f"{flag} says what to measure: give --measure with it.")


def _measure(
    args: argparse.Namespace, device: Literal["cuda", "cpu"], ranks: int
) -> tuple[Calibration, list[str]]:
    from autotune.calibrate.sweep import measure_machine
    from autotune.spec.model import load_model
    from autotune.spec.workload import Precision

    return measure_machine(
        device,
        ranks,
        model=load_model(args.model) if args.model else None,
        precisions=(Precision(args.precision),),
        packing=args.packing,
        seq_lens=args.seq_len,
    )


def _summary(calibration: Calibration) -> dict[str, Any]:
    """Return what a calibration holds, in a few numbers."""
    fastest = max((p.flops_per_s for p in calibration.matmuls), default=None)
    links = {
        str(curve.kind): curve.num_bytes[-1] / curve.times_s[-1]
        for curve in calibration.collectives
        if curve.ranks == calibration.num_ranks
    }
    return {
        "recorded_at": calibration.recorded_at,
        "duration_s": calibration.duration_s,
        "num_ranks": calibration.num_ranks,
        "threads": calibration.threads,
        "matmul_flops_per_s": fastest,
        "copy_bytes_per_s": calibration.copy_bytes_per_s,
        "elementwise_bytes_per_s": calibration.elementwise_bytes_per_s,
        "to_host_bytes_per_s": calibration.to_host_bytes_per_s,
        "from_host_bytes_per_s": calibration.from_host_bytes_per_s,
        "collective_bytes_per_s": links,
        "models": sorted({times.model for times in calibration.models}),
        "engines": [times.strategy for times in calibration.engines],
    }


def _print(document: dict[str, Any]) -> None:
    machine = document["machine"]
    lines = [
        f"{document['device']}: {machine['num_gpus']} x {machine['gpu']} ({machine['driver']})",
        str(machine["libraries"]),
    ]
    found = document["calibration"]
    if found is None:
        lines.append("not calibrated: autotune doctor --measure")
    else:
        lines.append(
            f"calibrated {found['recorded_at']} by {found['num_ranks']} rank(s) of "
            f"{found['threads']} thread(s), in {found['duration_s']:.0f} s; a rank reaches"
        )
        if found["matmul_flops_per_s"]:
            lines.append(f"  matrix products  {found['matmul_flops_per_s'] / 1e9:,.0f} GFLOP/s")
        for name, label in (
            ("copy_bytes_per_s", "copies"), ("elementwise_bytes_per_s", "elementwise"),
            ("to_host_bytes_per_s", "to the host"), ("from_host_bytes_per_s", "from the host"),
        ):  # fmt: skip
            if found[name]:
                lines.append(f"  {label:<16} {found[name] / 1e9:,.1f} GB/s")
        lines += [
            f"  {name.replace('_', '-'):<16} {rate / 1e9:,.2f} GB/s"
            for name, rate in found["collective_bytes_per_s"].items()
        ]
        if found["models"]:
            lines.append(f"  models           {', '.join(found['models'])}")
        if found["engines"]:
            lines.append(f"  engines          {', '.join(found['engines'])}")
        lines.append(f"  kept in {document['calibration_file']}")
    lines += [f"not measured: {note}" for note in document["not_measured"]]
    sys.stdout.write("\n".join(lines) + "\n")
