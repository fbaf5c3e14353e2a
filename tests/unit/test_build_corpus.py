import importlib.util
import json
import sys
import sysconfig
from pathlib import Path

import pytest

_FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "build_corpus.py"
_SPEC = importlib.util.spec_from_file_location("build_corpus", _FILE)
build_corpus = importlib.util.module_from_spec(_SPEC)
sys.modules["build_corpus"] = build_corpus
_SPEC.loader.exec_module(build_corpus)

_MODULE = '''
class Box(dict, metaclass=type):
    """Holds things."""

    async def get(self, key: str, /, *rest, default=None) -> int:
        """Return one thing."""

    def silent(self):
        pass

if True:
    def nested(a=1):
        """
        Inside an if.
        """

    def empty():
        """   """
'''


@pytest.fixture
def library(tmp_path, monkeypatch):
    root = tmp_path / "lib"
    (root / "pack").mkdir(parents=True)
    (root / "site-packages").mkdir()
    (root / "b.py").write_text(_MODULE)
    (root / "pack" / "__init__.py").write_text('def f():\n    "Same."\ndef f():\n    "Same."\n')
    (root / "broken.py").write_text("def (:")
    (root / "site-packages" / "other.py").write_text('def g():\n    "Not the library."\n')
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(root))
    return root


def test_pairs_are_the_library_s_own_and_different(library):
    pairs = build_corpus.library_pairs(library)
    assert [(pair.kind, pair.signature, pair.docstring) for pair in pairs] == [
        ("class", "class b.Box(dict, metaclass=type):", "Holds things."),
        (
            "function",
            "async def b.Box.get(self, key: str, /, *rest, default=None) -> int:",
            "Return one thing.",
        ),
        ("function", "def b.nested(a=1):", "Inside an if."),
        ("function", "def pack.f():", "Same."),
    ]


@pytest.mark.parametrize(
    ("style", "first"),
    [
        (
            "completion",
            {"text": 'class b.Box(dict, metaclass=type):\n    """Holds things."""\n'},
        ),
        (
            "alpaca",
            {
                "instruction": "Write the docstring of this Python class.",
                "input": "class b.Box(dict, metaclass=type):",
                "output": "Holds things.",
            },
        ),
        (
            "chat",
            {
                "messages": [
                    {
                        "role": "user",
                        "content": "Write the docstring of this Python class.\n\n"
                        "class b.Box(dict, metaclass=type):",
                    },
                    {"role": "assistant", "content": "Holds things."},
                ]
            },
        ),
    ],
)
def test_rows_of_each_format(library, tmp_path, capsys, style, first):
    out = tmp_path / "new" / "corpus.jsonl"
    assert build_corpus.main(["--out", str(out), "--format", style]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 4
    assert rows[0] == first
    assert capsys.readouterr().out == f"{out}: 4 pairs, {out.stat().st_size} bytes\n"


def test_too_few_pairs_fail_and_write_nothing(library, tmp_path, capsys):
    out = tmp_path / "corpus.jsonl"
    assert build_corpus.main(["--out", str(out), "--min-pairs", "5"]) == 1
    assert "4 pairs, fewer than 5" in capsys.readouterr().err
    assert not out.exists()


def test_a_real_package_gives_real_pairs():
    pairs = build_corpus.library_pairs(Path(json.__file__).parent)
    assert pairs == build_corpus.library_pairs(Path(json.__file__).parent)
    starts = [pair.docstring for pair in pairs if "loads(" in pair.signature]
    assert starts and starts[0].startswith("Deserialize ``s``")
