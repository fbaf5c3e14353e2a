"""`autotune report`: CSV and HTML again from a study's records, or two studies side by side."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from autotune.errors import AutotuneError

if TYPE_CHECKING:
    from collections.abc import Callable

    from autotune.report.study import Study

_T = TypeVar("_T")
COMPARISON = "comparison"
"""Name of a comparison's files, without their suffix."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the verb takes."""
    parser.add_argument(
        "study", type=Path, metavar="DIR", help="study folder that `autotune search` wrote"
    )
    parser.add_argument(
        "second", type=Path, nargs="?", metavar="DIR2", help="a second study to compare it with"
    )
    parser.add_argument(
        "--compare", type=Path, metavar="DIR2", help="another way to name the second study"
    )
    parser.add_argument(
        "--csv",
        type=Path,
        metavar="PATH",
        help="where the table goes (default: DIR/trials.csv; of two studies DIR/comparison.csv)",
    )
    parser.add_argument(
        "--html",
        type=Path,
        metavar="PATH",
        help="where the page goes (default: DIR/report.html; of two studies DIR/comparison.html)",
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON document on stdout instead of a table"
    )
    parser.add_argument("--open", action="store_true", help="open the page in the browser")


def run(args: argparse.Namespace) -> int:
    """Write both reports and print the answer; 0 also when no configuration fitted."""
    if args.second is not None and args.compare is not None:
        raise AutotuneError(
            f"Two second studies: {args.second} and --compare {args.compare}. Give one of them."
        )
    second = args.second or args.compare
    return _report_one(args) if second is None else _report_two(args, second)


def _check_targets(
    args: argparse.Namespace, csv_path: Path, html_path: Path, csv_mark: str
) -> None:
    from autotune.report.files import Target, check_targets
    from autotune.report.html import GENERATOR

    # Where no flag names the file it is one of the study's folder, ours whatever it holds.
    check_targets(
        [
            Target(flag="--csv", path=csv_path, mark=csv_mark if args.csv else None),
            Target(flag="--html", path=html_path, mark=GENERATOR if args.html else None),
        ]
    )


def _report_one(args: argparse.Namespace) -> int:
    # Here, so that `autotune --help` does not pay for rich and jinja2.
    from autotune.cli.tables import make_console
    from autotune.report.console import print_result
    from autotune.report.csv import CSV_MARK, write_csv
    from autotune.report.html import write_html
    from autotune.report.study import load_study

    study = load_study(args.study)
    csv_path = args.csv or study.folder.csv_file
    html_path = args.html or study.folder.html_file
    _check_targets(args, csv_path, html_path, CSV_MARK)
    _write(write_csv, study, csv_path)
    _write(write_html, study, html_path)
    if args.json:
        _print_json(_document(study), csv_path, html_path)
    else:
        print_result(study, make_console())
    return _end(args, csv_path, html_path)


def _report_two(args: argparse.Namespace, second: Path) -> int:
    from autotune.cli.tables import make_console
    from autotune.report.compare import compare, to_document
    from autotune.report.compare_console import print_comparison
    from autotune.report.compare_page import (
        CSV_MARK,
        write_comparison,
        write_comparison_csv,
    )
    from autotune.report.study import load_study

    comparison = compare(load_study(args.study), load_study(second))
    csv_path = args.csv or args.study / f"{COMPARISON}.csv"
    html_path = args.html or args.study / f"{COMPARISON}.html"
    _check_targets(args, csv_path, html_path, CSV_MARK)
    _write(write_comparison_csv, comparison, csv_path)
    _write(write_comparison, comparison, html_path)
    if args.json:
        _print_json(to_document(comparison), csv_path, html_path)
    else:
        print_comparison(comparison, make_console())
    return _end(args, csv_path, html_path)


def _print_json(document: dict[str, Any], csv_path: Path, html_path: Path) -> None:
    document |= {"csv": str(csv_path), "html": str(html_path)}
    sys.stdout.write(json.dumps(document, indent=1) + "\n")


def _end(args: argparse.Namespace, csv_path: Path, html_path: Path) -> int:
    sys.stderr.write(f"Wrote {csv_path} and {html_path}\n")
    if args.open:
        from autotune.report.browser import open_page

        sys.stderr.write(open_page(html_path) + "\n")
    return 0


def _write(write: Callable[[_T, Path], None], subject: _T, path: Path) -> None:
    try:
        write(subject, path)
    except OSError as error:
        raise AutotuneError(
            f"{path} cannot be written: {error.strerror or error}. Give another path with --csv "
            "or --html."
        ) from error


def _document(study: Study) -> dict[str, Any]:
    """Return the JSON of `autotune search`, with the trials from the records themselves."""
    from autotune.report.answer import find_answer

    best = study.summary.get("best")
    winner = find_answer(study).winner
    if best is None and winner is not None:  # killed before its first summary
        measured = {key: value for key, value in winner.to_dict().items() if key != "plan"}
        best = {"plan_id": winner.plan_id, "plan": winner.plan, "measured": measured}
    return {
        "study": study.name,
        "best": best,
        "trials": [record.to_dict() for record in study.records],
        "stopped_because": study.summary.get("stopped_because", ""),
        "rejected": study.rejected,
        "notes": list(study.notes),
    }
