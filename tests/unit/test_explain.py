"""`autotune explain`: every code of the rules, of the code and of the documents is explained."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest

import autotune
from autotune.cli import main
from autotune.explanations import EXPLANATIONS, RETIRED
from autotune.rules import rule_codes
from benchmarks.write_rules_table import DOCUMENT, with_table

ROOT = Path(autotune.__file__).parents[1]


@pytest.fixture
def run(capsys):
    def _run(*argv):
        with pytest.raises(SystemExit) as caught:
            main(["explain", *argv])
        out, err = capsys.readouterr()
        return caught.value.code, out, err

    return _run


def test_every_rule_is_explained_and_nothing_else():
    assert sorted(EXPLANATIONS) == rule_codes()
    assert not set(EXPLANATIONS) & set(RETIRED)
    for explanation in EXPLANATIONS.values():
        assert all(asdict(explanation).values())


def test_every_code_that_stands_anywhere_is_known():
    files = [*ROOT.glob("autotune/**/*.py"), *ROOT.glob("docs/**/*.md"), ROOT / "README.md"]
    found = {code for file in files for code in re.findall(r"\bAT\d{3}\b", file.read_text())}
    assert {"AT101", "AT118"} <= found
    assert found <= set(EXPLANATIONS) | set(RETIRED)


def test_the_document_has_the_table_of_today():
    text = DOCUMENT.read_text()
    assert with_table(text) == text, "run benchmarks/write_rules_table.py"
    assert with_table(text.replace("every rank has one place", "x")) == text


@pytest.mark.parametrize("code", EXPLANATIONS)
def test_one_code(run, code):
    exit_code, out, _ = run(code.lower())
    assert exit_code == 0
    words = " ".join(out.split())
    assert all(" ".join(part.split()) in words for part in asdict(EXPLANATIONS[code]).values())
    assert max(map(len, out.splitlines())) <= 88
    document = json.loads(run(code, "--json")[1])
    assert document == {"code": code, **asdict(EXPLANATIONS[code])}


def test_without_a_code_all_of_them(run):
    exit_code, out, _ = run()
    assert exit_code == 0
    assert [line.split()[0] for line in out.splitlines()[:-1]] == [*EXPLANATIONS, *RETIRED]
    assert [each["code"] for each in json.loads(run("--json")[1])] == list(EXPLANATIONS)


def test_a_rule_that_went(run):
    assert run("AT118")[:2] == (0, f"AT118 is unused: it {RETIRED['AT118']}.\n")
    assert json.loads(run("AT118", "--json")[1])["retired"] == RETIRED["AT118"]


@pytest.mark.parametrize(
    ("code", "nearest"),
    [("AT107x", "AT107"), ("AT130", "AT1"), ("999", "AT1"), ("A106", "AT106"), ("help", "")],
)
def test_an_unknown_code_is_answered_with_the_nearest(run, code, nearest):
    exit_code, out, err = run(code)
    assert exit_code == 2 and out == ""
    assert f"Nearest: {nearest}" in err if nearest else "Nearest" not in err
    assert "'autotune explain' lists all" in err
