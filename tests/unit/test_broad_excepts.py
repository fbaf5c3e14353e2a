"""What catches everything stands at the edge of a process, and says why."""

import ast
from pathlib import Path

import autotune

PACKAGE = Path(autotune.__file__).parent
BROAD = {"Exception", "BaseException"}
SAID = {*BROAD, "RuntimeError"}
"""RuntimeError is what libraries raise for lack of a better word."""
EDGES = {"cli/__init__.py", "runner/rank.py"}


def caught(handler):
    """Return the names a handler catches; a bare one catches BaseException."""
    if handler.type is None:
        return {"BaseException"}
    types = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return {ast.unparse(each).rpartition(".")[2] for each in types}


def faults(source, name):
    """Return the lines of a file that break the rule."""
    lines = source.splitlines()
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
            if BROAD & {ast.unparse(each) for each in node.args}:
                found.append(node.lineno)
        if not isinstance(node, ast.ExceptHandler) or not SAID & caught(node):
            continue
        header = " ".join(lines[node.lineno - 1 : node.body[0].lineno])
        says_why = "# " in header
        edge = name in EDGES or not BROAD & caught(node)
        if not (says_why and edge):
            found.append(node.lineno)
    return found


def test_what_is_caught_broadly_says_why():
    files = {str(path.relative_to(PACKAGE)): path.read_text() for path in PACKAGE.rglob("*.py")}
    assert {name: found for name, text in files.items() if (found := faults(text, name))} == {}
    assert files.keys() >= EDGES


def test_the_rule_finds():
    body = "try:\n    f()\n{}\n    pass\n"
    for header in ("except:", "except Exception:", "except (OSError, BaseException) as e:",
                   "except Exception:  # why", "except RuntimeError:"):  # fmt: skip
        assert faults(body.format(header), "plan.py"), header
    assert faults("with suppress(Exception):\n    f()\n", "plan.py")
    assert not faults(body.format("except RuntimeError:  # no driver"), "plan.py")
    assert not faults(body.format("except Exception:  # the edge"), "cli/__init__.py")
    # What only cleans up and raises again is an ExitStack.
    assert faults("try:\n    f()\nexcept Exception:  # why\n    raise\n", "plan.py")
