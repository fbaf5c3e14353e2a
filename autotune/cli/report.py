"""`autotune report`: CSV and HTML again from a study's records."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autotune.errors import AutotuneError

if TYPE_CHECKING:
    from collections.abc import Callable

    from autotune.report.study import Study


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the verb takes."""
    parser.add_argument(
        "study", type=Path, metavar="DIR", help="study folder that `autotune search` wrote"
    )
    parser.add_argument(
        "--csv", type=Path, metavar="PATH", help="where the table goes (default: DIR/trials.csv)"
    )
    parser.add_argument(
        "--html", type=Path, metavar="PATH", help="where the page goes (default: DIR/report.html)"
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON document on stdout instead of a table"
    )


def run(args: argparse.Namespace) -> int:
    """Write both reports and print the answer; 0 also when no configuration fitted."""
    # Here, so that `autotune --help` does not pay for rich and jinja2.
    from rich.console import Console

    from autotune.report.console import print_result
    from autotune.report.csv import write_csv
    from autotune.report.html import write_html
    from autotune.report.study import load_study

    study = load_study(args.study)
    csv_path = args.csv or study.folder.csv_file
    html_path = args.html or study.folder.html_file
    _write(write_csv, study, csv_path)
    _write(write_html, study, html_path)
    if args.json:
        document = _document(study) | {"csv": str(csv_path), "html": str(html_path)}
        sys.stdout.write(json.dumps(document, indent=1) + "\n")
    else:
        print_result(study, Console())
    Console(stderr=True).print(
        f"Wrote {csv_path} and {html_path}", markup=False, highlight=False, soft_wrap=True
    )
    return 0


def _write(write: Callable[[Study, Path], None], study: Study, path: Path) -> None:
    try:
        write(study, path)
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
