"""`autotune capacity`: which GPUs, how many, how long, at what cost."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autotune.cli.options import (
    GPU_TYPE_HELP,
    add_model_argument,
    add_tensor_parallel_argument,
    add_workload_arguments,
    comma_list,
    memory_limit_from,
    positive_int,
    tensor_parallel_from,
    workload_from,
)
from autotune.errors import AutotuneError, nearest
from autotune.folders import make_folder
from autotune.units import parse_count, parse_duration_s

if TYPE_CHECKING:
    from autotune.capacity import Answers, Calibration, Cell, Question


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the verb takes."""
    add_model_argument(parser)
    group = parser.add_argument_group("clusters")
    group.add_argument(
        "--gpu-type",
        type=comma_list,
        required=True,
        metavar="A,B",
        help=f"each {GPU_TYPE_HELP}",
    )
    group.add_argument(
        "--gpus", type=_counts, required=True, metavar="1,2,4", help="numbers of GPUs"
    )
    group.add_argument(
        "--memory-limit",
        metavar="SIZE",
        help="memory a GPU may use, such as 40GiB (default: all of it)",
    )
    group = parser.add_argument_group("question")
    group.add_argument("--tokens", metavar="10B", help="length of the training: 500M, 10B, 1T")
    group.add_argument(
        "--deadline",
        metavar="3d",
        help="time the training may take: 12h, 3d; without --tokens: what ends in it",
    )
    group.add_argument(
        "--budget", type=_positive, metavar="MONEY", help="what may be spent; needs --price"
    )
    group.add_argument(
        "--price",
        type=comma_list,
        default=[],
        metavar="A=2.5,B=4",
        help="price of one GPU and hour, by type",
    )
    group.add_argument("--power", action="store_true", help="energy of the boards at their TDP")
    group.add_argument(
        "--calibrate",
        type=Path,
        metavar="DIR",
        help="study of `autotune search`: corrects the cells of its model and GPU type",
    )
    add_workload_arguments(parser)
    parser.add_argument(
        "--strategies",
        type=comma_list,
        metavar="A,B",
        help="names or YAML files (default: all that ship)",
    )
    add_tensor_parallel_argument(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--csv", type=Path, metavar="PATH", help="write the table there")
    group.add_argument("--html", type=Path, metavar="PATH", help="write the page there")
    group.add_argument(
        "--out", type=Path, metavar="DIR", help="write capacity.csv and capacity.html there"
    )
    group.add_argument(
        "--json", action="store_true", help="one JSON document on stdout instead of a table"
    )


def run(args: argparse.Namespace) -> int:
    """Print the cells and the answers; write the files asked for."""
    from autotune.capacity import Question, find_answers, make_cells
    from autotune.report.capacity_files import CSV_MARK, GENERATOR
    from autotune.report.files import Target, check_targets
    from autotune.spec.model import load_model
    from autotune.spec.strategy import load_strategies

    started = time.perf_counter()
    if args.tokens is None and args.budget is None and args.deadline is None:
        raise AutotuneError(
            "Give the length of the training with --tokens 10B, or --budget or --deadline for what "
            "can be had."
        )
    types = _types(args.gpu_type)
    model = load_model(args.model, any_family=True)
    question = Question(
        model=model,
        workload=workload_from(args, model),
        tokens=parse_count(args.tokens) if args.tokens else None,
        budget=args.budget,
        deadline_s=parse_duration_s(args.deadline) if args.deadline else None,
        prices=_prices(args.price, types),
        with_power=args.power,
        tp_degrees=tensor_parallel_from(args),
    )
    unpriced = [name for name in types if name not in question.prices]
    if args.budget is not None and unpriced:
        raise AutotuneError(
            f"--budget needs a price for {', '.join(unpriced)}: --price "
            f"{','.join(f'{name}=PRICE' for name in unpriced)}, of one GPU and hour."
        )
    csv_path, html_path = _targets(args)
    kinds = (("--csv", csv_path, CSV_MARK), ("--html", html_path, GENERATOR))
    check_targets([Target(flag=flag, path=path, mark=mark) for flag, path, mark in kinds if path])
    calibration = _calibration(args.calibrate, question, types) if args.calibrate else None
    cells = make_cells(
        question,
        types,
        args.gpus,
        load_strategies(args.strategies),
        memory_limit_bytes=memory_limit_from(args),
        calibration=calibration,
    )
    _check_figures(cells)
    answers = find_answers(question, cells)
    written = _write(csv_path, html_path, question, cells, answers, calibration)
    if args.json:
        document = _document(question, cells, answers, calibration) | written
        document["elapsed_s"] = time.perf_counter() - started
        sys.stdout.write(json.dumps(document, indent=1) + "\n")
    else:
        from autotune.cli.tables import describe_workload, make_console
        from autotune.report.capacity_console import print_capacity

        workload = describe_workload(question.workload)
        print_capacity(make_console(), question, cells, answers, calibration, workload)
    if written:
        sys.stderr.write(f"Wrote {' and '.join(written.values())}\n")
    return 0


def _counts(text: str) -> list[int]:
    return sorted({positive_int(word) for word in comma_list(text)} or {positive_int(text)})


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _types(given: Sequence[str]) -> dict[str, str]:
    """Return what was given for each GPU type, by the name it is shown under."""
    from autotune.spec.gpus import CPU, find_gpu

    types: dict[str, str] = {}
    entries: dict[str, object] = {}
    for word in given:
        name, entry = (CPU, None) if word.lower() == CPU else find_gpu(word)
        if entries.setdefault(name, entry) != entry:
            raise AutotuneError(
                f"--gpu-type {types[name]} and {word} are both called {name}. Rename the file."
            )
        types.setdefault(name, word)
    if not types:
        raise AutotuneError("--gpu-type names no GPU. Give one or more, such as h100-sxm,l40s.")
    return types


def _prices(given: Sequence[str], types: dict[str, str]) -> dict[str, float]:
    prices: dict[str, float] = {}
    for word in given:
        gpu, _, text = word.rpartition("=")
        name = _priced_type(gpu, types)
        try:
            price = float(text)
        except ValueError:
            price = math.nan
        if not 0 < price < math.inf:
            raise AutotuneError(
                f"--price {word}: {text!r} is not a price above 0. Write it as "
                f"{name}=2.5, of one GPU and hour."
            )
        if name in prices:
            raise AutotuneError(f"--price names {name} twice. Give it once.")
        prices[name] = price
    return prices


def _priced_type(gpu: str, types: dict[str, str]) -> str:
    from autotune.spec.gpus import find_gpu

    if gpu in types:
        return gpu
    by_given = {given: name for name, given in types.items()}
    if gpu in by_given:
        return by_given[gpu]
    try:
        name = find_gpu(gpu)[0]
    except AutotuneError:
        name = gpu
    if name not in types:
        raise AutotuneError(
            f"--price names {gpu!r}, which --gpu-type does not.{nearest(gpu, types)} Write it as "
            f"{','.join(f'{known}=2.5' for known in types)}."
        )
    return name


def _targets(args: argparse.Namespace) -> tuple[Path | None, Path | None]:
    from autotune.report.capacity_files import CSV_FILE, HTML_FILE

    if args.out is None:
        return args.csv, args.html
    make_folder(args.out, "--out")
    return args.csv or args.out / CSV_FILE, args.html or args.out / HTML_FILE


def _check_figures(cells: Sequence[Cell]) -> None:
    """Refuse a question whose sums no number holds: JSON has no word for them."""
    for cell in cells:
        for name, value in cell.to_dict().items():
            if isinstance(value, float) and not math.isfinite(value):
                raise AutotuneError(
                    f"{name} of {cell.describe()} is too large for a number. Ask for fewer "
                    "--tokens or a smaller --budget, at a --price that is one."
                )


def _calibration(folder: Path, question: Question, types: dict[str, str]) -> Calibration:
    from autotune.capacity import calibrate
    from autotune.report.study import load_study
    from autotune.spec.gpus import CPU, find_gpu

    study = load_study(folder)
    return calibrate(
        str(folder),
        study.contract,
        study.records,
        model=question.model,
        workload=question.workload,
        gpu_types=types,
        nvml_names={
            name: () if name == CPU else find_gpu(given)[1].nvml_names
            for name, given in types.items()
        },
    )


def _write(
    csv_path: Path | None,
    html_path: Path | None,
    question: Question,
    cells: Sequence[Cell],
    answers: Answers,
    calibration: Calibration | None,
) -> dict[str, str]:
    written = {}
    try:
        if csv_path is not None:
            from autotune.report.capacity_files import write_csv

            write_csv(cells, csv_path)
            written["csv"] = str(csv_path)
        if html_path is not None:
            from autotune.cli.tables import describe_workload
            from autotune.report.capacity_page import write_page

            workload = describe_workload(question.workload)
            write_page(question, cells, answers, calibration, html_path, workload)
            written["html"] = str(html_path)
    except OSError as error:
        raise AutotuneError(
            f"{error.filename or 'A file'} cannot be written: {error.strerror or error}. Give "
            "another path."
        ) from error
    return written


def _document(
    question: Question,
    cells: Sequence[Cell],
    answers: Answers,
    calibration: Calibration | None,
) -> dict[str, Any]:
    from autotune.report.capacity_words import notes

    gpus = {cell.gpu_type: cell.hardware.gpu for cell in cells if cell.hardware}
    return {
        "model": question.model.name,
        "workload": question.workload.model_dump(mode="json"),
        "tokens": question.tokens,
        "budget": question.budget,
        "deadline_s": question.deadline_s,
        "gpu_types": {
            name: {
                "memory_bytes": gpu.memory_bytes,
                "power_w": gpu.power_w,
                "price_per_gpu_hour": question.prices.get(name),
                "source": gpu.source,
            }
            for name, gpu in gpus.items()
        },
        "calibration": calibration.to_dict() if calibration else None,
        "cells": [cell.to_dict() for cell in cells],
        "answers": answers.to_dict(),
        "notes": notes(question, cells, calibration),
    }
