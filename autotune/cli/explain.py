"""`autotune explain`: what a rule's code means, why it is a rule, what to do."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from dataclasses import asdict

from autotune.errors import AutotuneError, nearest
from autotune.explanations import EXPLANATIONS, RETIRED, Explanation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the verb takes."""
    parser.add_argument(
        "code", nargs="?", metavar="CODE", help="a rule's code, such as AT106 (default: list all)"
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON document on stdout instead of text"
    )


def run(args: argparse.Namespace) -> int:
    """Print one explanation, or a line for each code."""
    if args.code is None:
        _list(as_json=args.json)
        return 0
    code = args.code.strip().upper()
    if code in RETIRED:
        _print_retired(code, as_json=args.json)
        return 0
    if code not in EXPLANATIONS:
        known = [*EXPLANATIONS, *RETIRED]
        raise AutotuneError(
            f"There is no rule {args.code!r}.{nearest(code, known) or _by_number(code, known)} "
            "'autotune explain' lists all."
        )
    explanation = EXPLANATIONS[code]
    if args.json:
        document = {"code": code, **asdict(explanation)}
        sys.stdout.write(json.dumps(document, indent=1) + "\n")
    else:
        sys.stdout.write(_text(code, explanation))
    return 0


def _by_number(code: str, known: list[str]) -> str:
    """Return the nearest code by its number, for one that shares no letters with any."""
    digits = "".join(letter for letter in code if letter.isdigit())[:9]
    if not digits:
        return ""
    return f" Nearest: {min(known, key=lambda each: abs(int(each[2:]) - int(digits)))}."


def _text(code: str, explanation: Explanation) -> str:
    lines = [code]
    for name, words in asdict(explanation).items():
        lines += textwrap.wrap(
            words, 88, initial_indent=f"  {name.capitalize():<9}", subsequent_indent=" " * 11,
            break_on_hyphens=False, break_long_words=False,
        )  # fmt: skip
    return "\n".join(lines) + "\n"


def _list(*, as_json: bool) -> None:
    if as_json:
        document = [{"code": code, **asdict(each)} for code, each in EXPLANATIONS.items()]
        sys.stdout.write(json.dumps(document, indent=1) + "\n")
        return
    for code, each in EXPLANATIONS.items():
        sys.stdout.write(f"{code}  {each.refused}\n")
    for code, what in RETIRED.items():
        sys.stdout.write(f"{code}  (unused: it {what})\n")
    sys.stdout.write("'autotune explain CODE' says why, and what to do.\n")


def _print_retired(code: str, *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps({"code": code, "retired": RETIRED[code]}, indent=1) + "\n")
    else:
        sys.stdout.write(f"{code} is unused: it {RETIRED[code]}.\n")
