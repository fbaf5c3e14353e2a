"""The project's own files agree: versions, README, the ignore list, the Makefile's files."""

import argparse
import importlib
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

import autotune
from autotune.cli import VERBS
from autotune.spec.strategy import load_strategies

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
DOCUMENTS = [
    str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))
]


def flags_of(verb):
    parser = argparse.ArgumentParser()
    importlib.import_module(VERBS[verb][0]).add_arguments(parser)
    return {option for action in parser._actions for option in action.option_strings}


def commands(text):
    """Every `autotune VERB ...` in code, as (verb, flags)."""
    code = re.findall(r"```sh\n(.*?)```", text, re.DOTALL) + re.findall(r"`(autotune [^`]*)`", text)
    for line in "\n".join(code).splitlines():
        words = shlex.split(line.replace("\\|", "|"), comments=True)
        if words[:1] == ["autotune"] and len(words) > 1:
            yield words[1], [word for word in words if word.startswith("--")]


def test_version_is_said_alike():
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert stated == autotune.__version__


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_in_documents_exist(document):
    text = (ROOT / document).read_text()
    for verb, flags in commands(text):
        assert verb in VERBS or verb == "VERB" or verb.startswith("-"), verb
        if verb in VERBS:
            assert set(flags) <= flags_of(verb), f"autotune {verb}"


def test_the_command_finder_finds():
    text = "```sh\nautotune search --nope 1  # --not-this\n```\nor `autotune plan --model M`"
    assert list(commands(text)) == [("search", ["--nope"]), ("plan", ["--model"])]


def test_readme_names_every_verb():
    named = {verb for verb, _ in commands(README)}
    assert set(VERBS) <= named


@pytest.mark.parametrize("verb", ["search", "train"])
def test_the_makefile_uses_flags_that_exist(verb):
    expanded = MAKEFILE.replace("\\\n", " ")
    variables = dict(re.findall(r"^(DEMO_\w+) := (.*)$", expanded, re.MULTILINE))
    lines = re.findall(rf"-m autotune {verb} (.*)", expanded)
    assert lines
    for line in lines:
        for name, value in variables.items():
            line = line.replace(f"$({name})", value)
        given = {word for word in line.split() if word.startswith("--")}
        assert given and given <= flags_of(verb)


@pytest.mark.parametrize("strategy", [strategy.name for strategy in load_strategies()])
def test_every_strategy_is_in_the_readme(strategy):
    assert f"`{strategy}`" in README


def test_links_between_documents_lead_somewhere():
    for path in (ROOT / document for document in DOCUMENTS):
        for target in re.findall(r"\]\(([^)#]+)", path.read_text()):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path}: {target}"


def test_files_the_makefile_runs_exist():
    files = re.findall(r"\b(?:benchmarks|tests)/[\w./]+", MAKEFILE)
    assert files
    assert [name for name in files if not (ROOT / name).exists()] == []


def test_every_target_is_phony_and_in_the_help():
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    phony = set(re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[1].split())
    helped = re.search(r"^help:\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)[1]
    assert targets == phony
    assert [name for name in targets - {"help"} if not re.search(rf"\b{name}\b", helped)] == []


def git_ignores(path):
    done = subprocess.run(["git", "check-ignore", "--quiet", "--no-index", path], cwd=ROOT)
    assert done.returncode in (0, 1)
    return done.returncode == 0


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_the_ignore_list_keeps_sources():
    kept = ["autotune/report/html.py", "reports/examples/cpu/trials.csv", "strategies/new.yaml"]
    dropped = ["reports/qwen3-8b-8gpu/trials.csv", ".venv/bin/python", "demo/corpus.jsonl"]
    assert [path for path in kept if git_ignores(path)] == []
    assert [path for path in dropped if not git_ignores(path)] == []
