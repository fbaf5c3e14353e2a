"""Lower modules never import higher ones, and only the runner imports the training stack."""

import ast
from pathlib import Path

import pytest

import autotune

PACKAGE = Path(autotune.__file__).parent
LAYERS = [
    {"errors", "units", "resources", "folders", "explanations"},
    {"plan"},
    {"spec"},
    {"float8_rules"},
    {"training_rules", "tensor_rules"},
    {"rules"},
    {"memory", "timing"},
    {"planner"},
    {"trial"},
    {"calibrate"},
    {"config"},
    {"emit", "migrate"},
    {"search", "training", "capacity", "doctor", "ladder"},
    {"report"},
    {"cli", "__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
HEAVY = {"torch", "transformers", "accelerate", "deepspeed", "peft", "datasets"}
SLOW = {"optuna", "scipy", "pandas", "plotly", "rich", "jinja2"}
# Modules every command loads, or that plan and estimate load: nothing slow comes with them.
LIGHT = {
    "errors",
    "units",
    "resources",
    "plan",
    "spec",
    "float8_rules",
    "training_rules",
    "tensor_rules",
    "rules",
    "memory",
    "timing",
    "planner",
}


def imports(tree, package):
    """Yield (module, at_import_time) for every import, relative ones resolved."""
    lazy = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) not in lazy
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                kept = parents[: len(parents) - node.level + 1]
                base = ".".join([*kept, base] if base else kept)
            yield base, id(node) not in lazy
            if base == "autotune":
                for alias in node.names:
                    yield f"autotune.{alias.name}", id(node) not in lazy


def faults(source, path):
    """Return what a file of the package does against the two rules."""
    parts = path.with_suffix("").parts
    own = parts[0]
    package = ".".join(["autotune", *parts[:-1]])
    found = []
    for name, eager in imports(ast.parse(source), package):
        root, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if own == "runner":
            continue
        if root in HEAVY:
            found.append(f"{path} imports {name}; only the runner may")
        if root in SLOW and eager and (own in LIGHT or path == Path("cli/__init__.py")):
            found.append(f"{path} imports {name} at import time")
        if root != "autotune" or target in ("", "__version__"):
            continue
        if target == "runner":
            found.append(f"{path} imports the runner; it is started as a process")
        elif RANK[target] > RANK[own]:
            found.append(f"{own} may not import {target}")
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.name))
def test_direction(path):
    relative = path.relative_to(PACKAGE)
    if relative == Path("__init__.py"):
        assert not list(imports(ast.parse(path.read_text()), "autotune"))
        return
    assert faults(path.read_text(), relative) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("spec/model.py", "from autotune.search import space"),
        ("spec/model.py", "from ..search import space"),
        ("spec/model.py", "import autotune.planner"),
        ("memory/states.py", "from autotune import planner"),
        ("report/html.py", "import torch"),
        ("report/html.py", "def f():\n    from transformers.models import llama"),
        ("cli/search.py", "import autotune.runner.main"),
        ("cli/__init__.py", "import rich"),
        ("planner/ranking.py", "import pandas as pd"),
    ],
)
def test_broken_code_is_found(path, source):
    assert faults(source, Path(path))


def test_every_module_has_a_layer():
    names = {
        path.relative_to(PACKAGE).with_suffix("").parts[0] for path in PACKAGE.rglob("*.py")
    } - {"__init__", "runner"}
    assert names <= set(RANK)
